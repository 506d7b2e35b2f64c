"""The exact online gradient of element-wise recurrences in plain NumPy: one trace for each parameter, step by step.

An oracle that shares no code with the models, nor with any estimator, and uses no automatic differentiation: the
traces of the published equations, in closed form. Of one layer, started at zeros, with the loss Σ_t r_t · output_t.

Letters: T time, B lanes, M inputs, N units, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]


def sigmoid(values: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-values))


def elstm_online(p: Mapping[str, Array], inputs: Array, r: Array, *, through_z: bool = True) -> dict[str, Array]:
    """The gradient of what drives the state of an eLSTM layer.

    Args:
        p: F, Z, O (N, M), W_o (N, N), and w_f, w_z, b_f, b_z, b_o (N,).
        inputs: shape (T, B, M).
        r: the loss's weights of the outputs, (T, B, N).
        through_z: without, the influence of the old state through the candidate is left out: wrong.
    """
    lanes, units = inputs.shape[1], len(p["w_f"])
    c = np.zeros((lanes, units))
    matrix = {name: np.zeros((lanes, units, inputs.shape[2])) for name in ("F", "Z")}
    vector = {name: np.zeros((lanes, units)) for name in ("w_f", "w_z", "b_f", "b_z")}
    found = {name: np.zeros(p[name].shape) for name in (*matrix, *vector)}
    for x, weights in zip(inputs, r, strict=True):
        f = sigmoid(x @ p["F"].T + p["w_f"] * c + p["b_f"])
        z = np.tanh(x @ p["Z"].T + p["w_z"] * c + p["b_z"])
        hat = {"f": (c - z) * f * (1 - f), "z": (1 - f) * (1 - z**2)}
        decay = f + p["w_f"] * hat["f"] + (p["w_z"] * hat["z"] if through_z else 0.0)
        for name, gate in (("F", "f"), ("Z", "z")):
            matrix[name] = decay[..., None] * matrix[name] + hat[gate][..., None] * x[:, None]
        for gate in ("f", "z"):
            vector[f"w_{gate}"] = decay * vector[f"w_{gate}"] + hat[gate] * c
            vector[f"b_{gate}"] = decay * vector[f"b_{gate}"] + hat[gate]
        c = f * c + (1 - f) * z
        o = sigmoid(x @ p["O"].T + c @ p["W_o"].T + p["b_o"])
        e = weights * o + (weights * c * o * (1 - o)) @ p["W_o"]  # of the loss at this step, by the new state
        for name, trace in (matrix | vector).items():
            found[name] += np.einsum("bn,bn...->n...", e, trace)
    return found


def lru_online(p: Mapping[str, Array], inputs: Array, r: Array) -> dict[str, Array]:
    """The gradient of what drives the state of an LRU layer.

    Args:
        p: nu_log, theta_log, gamma_log (N,), B_real, B_imag (N, M), C_real, C_imag (O, N).
        inputs: shape (T, B, M).
        r: the loss's weights of the outputs, (T, B, O).
    """
    lanes, units = inputs.shape[1], len(p["nu_log"])
    decay = np.exp(-np.exp(p["nu_log"]) + 1j * np.exp(p["theta_log"]))
    gamma, weight = np.exp(p["gamma_log"]), p["B_real"] + 1j * p["B_imag"]
    h, by_decay, by_gamma = (np.zeros((lanes, units), complex) for _ in range(3))
    by_weight = np.zeros((lanes, units, inputs.shape[2]), complex)
    sums = {"decay": np.zeros(units, complex), "gamma": np.zeros(units), "weight": np.zeros(weight.shape, complex)}
    for x, weights in zip(inputs, r, strict=True):
        by_decay = decay * by_decay + h
        by_gamma = decay * by_gamma + x @ weight.T
        by_weight = decay[:, None] * by_weight + gamma[:, None] * x[:, None]
        h = decay * h + gamma * (x @ weight.T)
        s = weights @ (p["C_real"] + 1j * p["C_imag"])  # a change dh of the state changes the loss by Re(s dh)
        sums["decay"] += (s * by_decay).sum(0)
        sums["gamma"] += (s * by_gamma).real.sum(0)
        sums["weight"] += np.einsum("bn,bnm->nm", s, by_weight)
    return {
        "nu_log": (-sums["decay"] * decay).real * np.exp(p["nu_log"]),
        "theta_log": (1j * sums["decay"] * decay).real * np.exp(p["theta_log"]),
        "gamma_log": sums["gamma"] * gamma,
        "B_real": sums["weight"].real,
        "B_imag": -sums["weight"].imag,
    }
