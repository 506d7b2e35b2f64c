// Presses every button of a page WIDTH pixels wide, and writes down what each figure shows and what a person would
// stumble over: parts beyond the page's edge, text that runs into other text or out of its figure, pictures squeezed by
// their legend, text too pale to read (a contrast below 4.5, as WCAG 2.2 AA has it).
(async () => {
  const wait = (time) => new Promise((done) => setTimeout(done, time));
  const frame = () => new Promise((done) => requestAnimationFrame(done));

  // Figures are drawn again when their room changes, frames later: until nothing moves any more.
  async function settled(plot) {
    for (let before = "", still = 0; still < 3;) {
      await wait(50);
      await Promise.race([frame(), wait(100)]); // a page that nobody sees need not have frames
      const now = JSON.stringify([...plot.querySelectorAll("svg text")].map((text) => text.getBoundingClientRect()));
      still = now === before ? still + 1 : 0;
      before = now;
    }
  }

  while (!document.documentElement.dataset.drawn) await wait(50);
  const width = Math.min(WIDTH, innerWidth);
  document.body.style.width = `${width}px`;
  for (const plot of document.querySelectorAll(".plot")) await settled(plot);
  const faults = new Set();
  const box = (each) => each.getBoundingClientRect();
  const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
  const linear = (value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [red, green, blue] = numbers(colour).map((value) => linear(value / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05;
  };

  function behind(each) {
    if (!each) return "rgb(255, 255, 255)";
    const [red, green, blue, share = 1] = numbers(getComputedStyle(each).backgroundColor);
    if (share === 1) return `rgb(${red}, ${green}, ${blue})`;
    const below = numbers(behind(each.parentElement));
    return `rgb(${[red, green, blue].map((value, index) => share * value + (1 - share) * below[index])})`;
  }

  function isPale(each, colour) {
    const [low, high] = [light(colour), light(behind(each))].sort((a, b) => a - b);
    return high / low < 4.5;
  }

  function lookAtText() {
    if (document.documentElement.scrollWidth > innerWidth) faults.add("the page scrolls sideways");
    for (const each of document.querySelectorAll("main *")) {
      if (each.closest(".scroll, .plot, .mark, wbr, script") || !box(each).width) continue;
      const told = `${each.tagName} ${each.textContent.slice(0, 30)}`;
      if (box(each).right > width + 1) faults.add(`beyond the edge: ${told}`);
      if (!each.childElementCount && each.textContent && isPale(each, getComputedStyle(each).color)) faults.add(`pale: ${told}`);
    }
  }

  function lookAtFigure(plot, title) {
    const room = box(plot), inner = box(plot.querySelector(".nsewdrag"));
    if (inner.height < 150 || inner.width < 200) faults.add(`squeezed: ${title}`);
    const texts = [...plot.querySelectorAll("svg text")].filter((text) => box(text).width && text.textContent.trim());
    texts.forEach((text, number) => {
      const a = box(text), told = `${title}: ${text.textContent}`;
      if (a.right > room.right + 1 || a.left < room.left - 1) faults.add(`cut off: ${told}`);
      if (a.bottom > room.bottom + 1 || a.top < room.top - 1) faults.add(`cut off: ${told}`);
      if (isPale(plot, getComputedStyle(text).fill)) faults.add(`pale: ${told}`);
      for (const other of texts.slice(number + 1)) {
        const b = box(other);
        const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
        const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
        if (across > 2 && down > 4) faults.add(`overlap: ${told} / ${other.textContent}`);
      }
    });
  }

  lookAtText();
  for (const holder of document.querySelectorAll("figure")) {
    const plot = holder.querySelector(".plot"), title = holder.querySelector("h3").textContent;
    const titles = () => [plot.layout.xaxis.title.text, plot.layout.xaxis.type, plot.layout.yaxis.title.text,
                          plot.layout.yaxis.type, plot.querySelectorAll("g.trace").length].join("; ");
    lookAtFigure(plot, title);
    const seen = [titles()];
    for (const button of [...holder.querySelectorAll("button")].slice(1)) {
      button.click();
      while (holder.dataset.shown !== holder.dataset.chosen) await wait(50);
      await settled(plot);
      lookAtFigure(plot, title);
      seen.push(`${button.getAttribute("aria-pressed")}: ${titles()}`);
    }
    holder.dataset.seen = seen.join(" | ");
  }
  document.body.dataset.faults = JSON.stringify([...faults]);
  document.body.dataset.paper = getComputedStyle(document.body).backgroundColor;
})();
