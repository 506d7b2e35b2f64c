(() => {
  "use strict";
  const isDark = matchMedia("(prefers-color-scheme: dark)");
  const inks = { false: { ink: "#1c2126", grid: "#e3e7eb", line: "#9aa4ae", paper: "#ffffff" },
                 true: { ink: "#d5dbe1", grid: "#2b333b", line: "#6b7680", paper: "#1e242a" } };
  const onDark = { "#0072B2": "#56B4E9", "#D55E00": "#FF8A3D", "#009E73": "#2FCF9F", "#AA4499": "#E08BD0",
                   "#8C6D00": "#E5C13B", "#555555": "#B9C0C7" };
  const canHover = matchMedia("(hover: hover)").matches;
  const config = { displaylogo: false, displayModeBar: canHover ? "hover" : false, showSendToCloud: false,
                   plotlyServerURL: "", typesetMath: false, modeBarButtons: [["zoom2d", "pan2d", "resetScale2d", "toImage"]],
                   toImageButtonOptions: { format: "svg" } };
  const isPlain = (value) => value !== null && typeof value === "object" && !Array.isArray(value);

  // Fresh objects all the way down, since plotly.js writes into what it is given; colours as the page's.
  function copied(value, key = "") {
    if (Array.isArray(value)) return value.map((each) => copied(each, key));
    if (isPlain(value)) return Object.fromEntries(Object.entries(value).map(([name, each]) => [name, copied(each, name)]));
    return isDark.matches && /color$/.test(key) && value in onDark ? onDark[value] : value;
  }

  function merged(below, above) {
    const found = { ...below };
    for (const [name, value] of Object.entries(above)) {
      found[name] = isPlain(value) && isPlain(below[name]) ? merged(below[name], value) : value;
    }
    return found;
  }

  function base() {
    const { ink, grid, line, paper } = inks[isDark.matches];
    const axis = { gridcolor: grid, linecolor: line, zeroline: false, automargin: true, ticks: "outside",
                   tickcolor: line, title: { standoff: 10 } };
    return { font: { family: "system-ui, 'Segoe UI', Roboto, sans-serif", size: 13, color: ink },
             paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 56, r: 18, t: 12, b: 44 },
             hovermode: "closest", dragmode: canHover ? "zoom" : false,  // on a touch screen dragging scrolls the page
             hoverlabel: { bgcolor: paper, font: { color: ink }, namelength: -1 },
             modebar: { bgcolor: "rgba(0,0,0,0)", color: line, activecolor: ink, orientation: "v" },
             legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
             xaxis: { ...axis }, yaxis: { ...axis } };
  }

  // Over one to three powers of ten plotly.js writes all digits between them, which run into each other.
  function thinOut(plot) {
    const changes = {};
    for (const name of ["xaxis", "yaxis"]) {
      const { type, tickmode, range } = plot.layout[name];
      const powers = type === "log" && tickmode !== "array" ? Math.abs(range[1] - range[0]) : 0;
      const narrow = name === "xaxis" && plot.clientWidth < 500 && powers > 0;
      changes[`${name}.nticks`] = (powers >= 1 || narrow) && powers < 3 ? 3 : 0;
    }
    return Plotly.relayout(plot, changes);
  }

  // The legend gets room of its own, so that many names on a narrow page do not squeeze the picture.
  function fit(plot) {
    const legend = plot.querySelector(".infolayer .legend");
    const room = legend ? Math.ceil(legend.getBoundingClientRect().height) : 0;
    plot.style.height = `calc(var(--height) + ${room}px)`;
    return Plotly.Plots.resize(plot);
  }

  async function draw(holder, chosen) {
    const figure = JSON.parse(holder.querySelector('script[type="application/json"]').textContent);
    const plot = holder.querySelector(".plot");
    holder.dataset.chosen = chosen;
    await Plotly.react(plot, copied(figure.data), merged(base(), copied(figure.layout)), config);
    const choice = figure.choices[chosen];
    if (choice) await Plotly.update(plot, copied(choice.data), copied(choice.layout));
    await thinOut(plot);
    await fit(plot);
    holder.dataset.shown = chosen;
  }

  // One of several: the pressed button is the chosen one.
  function choose(buttons, chosen) {
    buttons.forEach((button, number) => button.setAttribute("aria-pressed", String(number === chosen)));
  }

  const figures = [...document.querySelectorAll("figure")];
  for (const holder of figures) {
    const buttons = [...holder.querySelectorAll(".choices button")];
    buttons.forEach((button, number) => button.addEventListener("click", () => {
      choose(buttons, number);
      draw(holder, number);
    }));
  }
  const resized = new ResizeObserver((entries) => entries.forEach(({ target }) => {
    if (target.layout && target.clientWidth) Plotly.Plots.resize(target).then(() => fit(target));
  }));

  function showStrip(holder, chosen) {
    const strips = [...holder.querySelectorAll(".strip")];
    strips.forEach((strip, number) => { strip.hidden = number !== chosen; });
    choose([...holder.querySelectorAll(".choices button")], chosen);
  }

  function stripOfAddress() {
    const strip = /^#strip-\d+$/.test(location.hash) && document.querySelector(location.hash);
    if (strip) showStrip(strip.parentElement, [...strip.parentElement.querySelectorAll(".strip")].indexOf(strip));
  }

  for (const holder of document.querySelectorAll(".strips")) {
    holder.querySelectorAll(".choices button").forEach((button, number) => {
      button.addEventListener("click", () => showStrip(holder, number));
    });
    showStrip(holder, 0);
  }
  stripOfAddress();
  addEventListener("hashchange", stripOfAddress);

  const drawAll = () => Promise.all(figures.map((holder) => draw(holder, Number(holder.dataset.chosen || 0))));
  isDark.addEventListener("change", drawAll);
  drawAll().then(() => {
    document.querySelectorAll(".plot").forEach((plot) => resized.observe(plot));
    document.documentElement.dataset.drawn = figures.length;
  });
})();
