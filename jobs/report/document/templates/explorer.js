
"use strict";
(() => {
  const $ = (name) => document.getElementById("x-" + name);
  if (!$("data")) return;
  const { runs, colours, cut } = JSON.parse($("data").textContent);
  const MEAN = "mean", BOTH = "content - positional";
  const unpacked = new WeakMap();
  const bytes = (text) => Uint8Array.from(atob(text), (each) => each.charCodeAt(0));
  const unique = (values) => [...new Set(values)];
  const channel = (hex, at) => parseInt(hex.slice(at, at + 2), 16);
  const shade = (stops, share) => {
    const place = Math.min(1, Math.max(0, share)) * (stops.length - 1);
    const low = Math.floor(place), high = Math.min(low + 1, stops.length - 1);
    const mixed = [0, 2, 4].map((at) => channel(stops[low], at) + (place - low) * (channel(stops[high], at) - channel(stops[low], at)));
    return `rgb(${mixed.map(Math.round).join(" ")})`;
  };
  const DIVERGING = ["2d004b", "8073ac", "f7f7f7", "e08214", "7f3b08"];

  // what is chosen: indices of the sliders' values
  const sliders = { seed: [], epoch: [], layer: [], head: [], row: [], column: [] };
  const chosen = (name) => sliders[name][Number($(name).value)];

  const packed = (run, kind, epoch) => {
    const index = run.epochs.indexOf(epoch);
    const found = run[kind][index];
    if (found === undefined) return null;
    if (!unpacked.has(run)) unpacked.set(run, new Map());
    const key = kind + index, own = unpacked.get(run);
    if (!own.has(key)) own.set(key, bytes(kind === "similarity" ? found : found[0]));
    return own.get(key);
  };
  // the row of a patch in a run's matrix, n numbers; null: not in this file
  const similarities = (run, patch) => {
    const data = packed(run, "similarity", chosen("epoch")), n = run.side ** 2;
    return data && Array.from(data.subarray(patch * n, (patch + 1) * n), (each) => each / 127.5 - 1);
  };
  const attention = (run, patch) => {
    const n = run.side ** 2, of = (kind) => packed(run, kind, chosen("epoch"));
    const kind = of("of_heads") || chosen("head") !== MEAN ? "of_heads" : "of_layers";  // the latter: the heads' mean
    const data = of(kind), count = kind === "of_heads" ? run.heads : 1;
    if (!data) return null;
    const largest = run[kind][run.epochs.indexOf(chosen("epoch"))][1];
    const layers = chosen("layer") === MEAN ? [...Array(run.layers).keys()] : [chosen("layer")];
    const heads = chosen("head") === MEAN ? [...Array(count).keys()] : [chosen("head")];
    const sum = new Array(n).fill(0);
    for (const layer of layers) for (const head of heads) {
      const matrix = layer * count + head, from = (matrix * n + patch) * n;
      for (let each = 0; each < n; each++) sum[each] += data[from + each] / 255 * largest[matrix];
    }
    return sum.map((value) => value / (layers.length * heads.length));
  };

  const members = () => runs.filter((run) => run.group === $("group").value);
  const shown = () => {
    const own = members().filter((run) => run.seed === chosen("seed"));
    const names = $("which").value === BOTH ? ["content", "positional"] : [$("which").value];
    return names.map((name) => own.find((run) => run.attention === name));
  };
  const row = (of, patch) => {
    const rows = shown().map((run) => run && of(run, patch));
    if (rows.some((each) => !each)) return null;
    return rows.length === 1 ? rows[0] : rows[0].map((value, index) => value - rows[1][index]);
  };

  const fill = (name, values, text, keep) => {
    const before = chosen(name);
    sliders[name] = values;
    const at = values.indexOf(before);
    $(name).max = Math.max(0, values.length - 1);
    $(name).value = keep && at >= 0 ? at : name === "epoch" ? values.length - 1 : 0;
    $(name).disabled = values.length < 2;
    $(name).dataset.text = text;
  };
  const side = () => Math.max(...members().map((run) => run.side));
  const refill = () => {
    const own = members(), names = unique(own.map((run) => run.attention)), before = $("which").value;
    const options = names.includes("content") && names.includes("positional") ? [...names, BOTH] : names;
    $("which").replaceChildren(...options.map((name) => new Option(name, name, false, name === before)));
    const which = own.filter((run) => $("which").value === BOTH || run.attention === $("which").value);
    const both = $("which").value === BOTH;
    const seeds = unique(which.map((run) => run.seed));
    fill("seed", both ? seeds.filter((seed) => which.filter((run) => run.seed === seed).length === 2) : seeds, "", true);
    fill("epoch", unique(which.flatMap((run) => run.epochs)).sort((a, b) => a - b), "", true);
    const count = (name) => [MEAN, ...Array(Math.max(0, ...which.map((run) => run[name]))).keys()];
    fill("layer", count("layers"), "", true);
    fill("head", both ? [MEAN] : count("heads"), "", true);  // heads have no partners in another network
    for (const name of ["row", "column"]) fill(name, [...Array(side()).keys()], "", true);
    const permuted = which.some((run) => run.order);
    $("undo").hidden = $("undo-label").hidden = !permuted;
  };

  // where each patch of the original is shown; itself where nothing is permuted, or that is undone
  const places = () => {
    const order = members().map((run) => run.order).find((each) => each);
    return order && !$("undo").checked ? order : [...Array(side() ** 2).keys()];
  };
  const current = () => Number($("row").value) * side() + Number($("column").value);  // its place in the picture

  const paint = (name, values, low, high, stops) => {
    const canvas = $(name), g = side(), size = Math.max(4, Math.floor(320 / g)), context = canvas.getContext("2d");
    canvas.width = canvas.height = g * size;
    if (!values) return;
    const at = places();
    values.forEach((value, patch) => {
      context.fillStyle = shade(stops, (value - low) / (high - low || 1));
      context.fillRect((at[patch] % g) * size, Math.floor(at[patch] / g) * size, size, size);
    });
    const x = (current() % g) * size, y = Math.floor(current() / g) * size;
    for (const [style, width] of [["#fff", 4], ["#d00", 2]]) {
      context.strokeStyle = style;
      context.lineWidth = width;
      context.strokeRect(x + 2, y + 2, size - 4, size - 4);
    }
  };
  const best = (values, patch, digits) => {
    const g = side(), at = places();
    const others = values.map((value, index) => [value, at[index]]).filter((_, index) => index !== patch);
    const first = others.sort((a, b) => b[0] - a[0]).slice(0, 4);
    return first.map(([value, place]) => `row ${Math.floor(place / g) + 1} column ${place % g + 1} (${value.toFixed(digits)})`).join(", ");
  };
  const draw = () => {
    const both = $("which").value === BOTH, patch = places().indexOf(current());
    for (const name of Object.keys(sliders)) {
      const value = chosen(name);
      const text = name === "epoch" && value === 0 ? "0 (initially)" : name === "row" || name === "column" ? value + 1 : value;
      $(name + "-says").textContent = text === undefined ? "-" : text;
      $(name).setAttribute("aria-valuetext", $(name + "-says").textContent);
    }
    const absent = "not in this file: left out, as said below, or not measured";
    const alike = row(similarities, patch), attends = row(attention, patch);
    const ends = both ? Math.max(1e-6, ...(alike || [0]).map(Math.abs)) : cut;
    paint("similarity", alike, -ends, ends, both ? DIVERGING : colours);
    $("similarity-says").textContent = alike ? `colours from -${ends.toFixed(2)} to ${ends.toFixed(2)}` : absent;
    const most = Math.max(1e-6, ...(attends || [0]).map(Math.abs));
    paint("attention", attends, both ? -most : 0, most, both ? DIVERGING : colours);
    $("attention-says").textContent = attends ? `colours from ${both ? "-" + most.toFixed(3) : 0} to ${most.toFixed(3)}` : absent;
    const where = `Patch in row ${Number($("row").value) + 1}, column ${Number($("column").value) + 1}.`;
    const first = alike ? ` Most alike${both ? " in content compared with positional" : ""}: ${best(alike, patch, 2)}.` : "";
    const second = attends ? ` Attends most to${both ? ", in content compared with positional" : ""}: ${best(attends, patch, 3)}.` : "";
    $("status").textContent = where + first + second;
  };
  const go = (rowTo, columnTo) => {
    const last = side() - 1;
    $("row").value = Math.min(last, Math.max(0, rowTo));
    $("column").value = Math.min(last, Math.max(0, columnTo));
    draw();
  };

  for (const name of ["similarity", "attention"]) {
    const point = (event) => {
      const box = $(name).getBoundingClientRect(), g = side();
      go(Math.floor((event.clientY - box.top) / box.height * g), Math.floor((event.clientX - box.left) / box.width * g));
    };
    $(name).addEventListener("pointermove", point);
    $(name).addEventListener("pointerdown", point);
    $(name).addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
      if (!move) return;
      event.preventDefault();
      go(Number($("row").value) + move[0], Number($("column").value) + move[1]);
    });
  }
  $("group").replaceChildren(...unique(runs.map((run) => run.group)).map((name) => new Option(name)));
  for (const name of ["group", "which"]) $(name).addEventListener("change", () => { refill(); draw(); });
  for (const name of [...Object.keys(sliders), "undo"]) $(name).addEventListener("input", draw);
  refill();
  go(Math.floor(side() / 2), Math.floor(side() / 2));
  $("explorer").hidden = false;
})();
