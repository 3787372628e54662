// One prompt, its tokens coloured by a quantity at a chosen layer and head.
// The module of an anywidget (default export) and of a page (renderPage). It loads nothing.

const MINUS = "\u2212";
const INVISIBLE = /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff]/g;

function bytes(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer;
}

function float32(base64) {
  return new Float32Array(bytes(base64));
}

function decodeQuantised(part, bits) {
  const buffer = bytes(part.values);
  return { counts: bits === 16 ? new Int16Array(buffer) : new Int8Array(buffer), steps: float32(part.steps) };
}

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

/** A number with 3 significant digits and a sign that can be read without colour. */
function format(value, signed) {
  if (!Number.isFinite(value)) return "undefined";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const digits = size < 1e-3 || size >= 1e4 ? size.toExponential(2) : size.toPrecision(3);
  const text = digits.replace("e-", `e${MINUS}`).replace("e+", "e");
  return value < 0 ? MINUS + text : signed && value > 0 ? "+" + text : text;
}

/** A token's text with white space and control characters that can be seen. */
function visible(text) {
  const spelled = text.replace(INVISIBLE, (c) => (c === "\t" ? "⇥" : `‹U+${c.charCodeAt(0).toString(16).padStart(4, "0")}›`));
  const blank = spelled.trim() === "" ? spelled.replaceAll(" ", "␣") : spelled;
  return blank.replaceAll("\n", "⏎\n") || "∅";
}

function spoken(text) {
  return visible(text).replaceAll("⏎\n", "line break ").replaceAll("␣", "space ").trim();
}

let instances = 0;

function mount(data, el, selection) {
  const id = `icl-view-${instances++}`;
  const nHeads = data.heads, nGroups = data.groups.length, nPieces = data.pieces.text.length;
  const quantities = data.quantities.map((q) => ({ ...q, ...decodeQuantised(q, data.bits), sums: float32(q.sums) }));
  const headNumbers = data.headNumbers.map((n) => ({ title: n.title, values: float32(n.values) }));
  const panes = data.panes.map((p) => ({ ...p, ...decodeQuantised(p, data.bits) }));
  const state = { row: 0, head: 0, quantity: 0, summed: !data.byPiece, grid: "", piece: null, focusPiece: 0 };
  const groupPresent = data.groups.map((_, g) => quantities.some((q) => q.sums.some((v, i) => i % nGroups === g && v !== 0)));

  const cell = () => state.row * nHeads + state.head;
  const nUnits = (part) => part.counts.length / (data.layers.length * nHeads);
  function unitValue(part, at, unit) {
    const count = part.counts[at * nUnits(part) + unit];
    return count === -(2 ** (data.bits - 1)) ? NaN : count * part.steps[at];
  }
  const groupValue = (q, at, group) => q.sums[at * nGroups + group];
  const pieceValue = (q, at, piece) =>
    state.summed ? groupValue(q, at, data.pieces.group[piece]) : unitValue(q, at, data.pieces.unit[piece]);
  const largest = (values) => values.reduce((most, v) => (Number.isFinite(v) ? Math.max(most, Math.abs(v)) : most), 0) || 1;
  const sum = (values) => values.reduce((total, v) => total + v, 0);

  /** Colour by size and sign: CSS mixes the colour, and draws a line that differs by sign. */
  function paint(target, value, most) {
    const size = Number.isFinite(value) ? Math.abs(value) / most : 0;
    target.style.setProperty("--amount", `${(100 * size).toFixed(1)}%`);
    const sign = !Number.isFinite(value) ? "undefined" : size < 0.02 ? "none" : value < 0 ? "negative" : "positive";
    target.dataset.sign = sign;
  }

  // Controls
  const quantitySelect = element("select", { id: `${id}-quantity` }, ...quantities.map((q, i) => element("option", { value: i }, q.title)));
  const modeSelect = element(
    "select",
    { id: `${id}-mode` },
    element("option", { value: "tokens", disabled: !data.byPiece }, "token by token"),
    element("option", { value: "summed" }, "summed by source"),
  );
  modeSelect.value = state.summed ? "summed" : "tokens";
  const gridSelect = element("select", { id: `${id}-grid-of` });
  const labelled = (control, text) => element("label", { for: control.id }, element("span", {}, text), control);
  const controls = element(
    "div",
    { class: "icl-controls", role: "group", "aria-label": "What to show" },
    labelled(quantitySelect, "Quantity"),
    labelled(modeSelect, "Tokens"),
    labelled(gridSelect, "Grid shows"),
  );

  // The grid of layers and heads
  const gridTable = element("table", { role: "grid", class: "icl-grid", "aria-labelledby": `${id}-grid-title` });
  gridTable.append(
    element("thead", {}, element("tr", { role: "row" }, element("th", { role: "columnheader", "aria-label": "layer" }),
      ...Array.from({ length: nHeads }, (_, h) => element("th", { scope: "col", role: "columnheader" }, String(h))))),
  );
  const cells = [];
  const body = element("tbody");
  data.layers.forEach((layer, row) => {
    const line = element("tr", { role: "row" }, element("th", { scope: "row", role: "rowheader" }, String(layer)));
    for (let head = 0; head < nHeads; head++) {
      const box = element("td", { role: "gridcell", tabindex: -1, "aria-selected": "false" });
      box.addEventListener("click", () => choose(row, head, true));
      cells.push(box);
      line.append(box);
    }
    body.append(line);
  });
  gridTable.append(body);
  gridTable.addEventListener("keydown", (event) => {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1], PageUp: [-5, 0], PageDown: [5, 0] };
    let { row, head } = state;
    if (event.key in moves) [row, head] = [row + moves[event.key][0], head + moves[event.key][1]];
    else if (event.key === "Home") [row, head] = [event.ctrlKey ? 0 : row, 0];
    else if (event.key === "End") [row, head] = [event.ctrlKey ? data.layers.length - 1 : row, nHeads - 1];
    else return;
    event.preventDefault();
    event.stopPropagation();
    const within = (value, n) => Math.min(Math.max(value, 0), n - 1);
    choose(within(row, data.layers.length), within(head, nHeads), true);
  });

  // The prompt: one stop of the tab key, arrow keys move between tokens
  const scroller = element("div", { class: "icl-scroll" }, gridTable);
  const tokens = element("div", { role: "listbox", class: "icl-tokens", "aria-labelledby": `${id}-tokens-title`, "aria-orientation": "horizontal" });
  const tokenElement = (pieces, index) => element("bdi", { class: "icl-token" }, visible(pieces.text[index]));
  const tokenElements = data.pieces.text.map((_, index) => {
    const span = tokenElement(data.pieces, index);
    span.setAttribute("role", "option");
    span.setAttribute("tabindex", -1);
    span.addEventListener("click", () => { moveToken(index, true); pin(index); });
    return span;
  });
  data.pieces.text.forEach((_, index) => {
    const group = data.pieces.group[index];
    if (index > 0 && group !== data.pieces.group[index - 1]) tokens.append(element("span", { class: "icl-border", "aria-hidden": "true" }));
    tokens.append(tokenElements[index]);
  });
  tokens.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -10, ArrowDown: 10 };
    let next = state.focusPiece;
    if (event.key in moves) next += moves[event.key];
    else if (event.key === "Home") next = 0;
    else if (event.key === "End") next = nPieces - 1;
    else if (event.key === "Enter" || event.key === " ") { event.preventDefault(); return pin(state.focusPiece); }
    else if (event.key === "Escape") { event.preventDefault(); return pin(null); }
    else return;
    event.preventDefault();
    event.stopPropagation();
    moveToken(Math.min(Math.max(next, 0), nPieces - 1), true);
  });

  const status = element("p", { class: "icl-status", role: "status", "aria-live": "polite" });
  const legend = element("div", { class: "icl-legend" });
  const note = element("p", { class: "icl-note" });
  const sums = element("table", { class: "icl-table icl-sums" });
  const heads = element("table", { class: "icl-table icl-head-numbers" });
  const tokenTable = element("table", { class: "icl-table icl-token-table" });
  const tableDetails = element("details", { class: "icl-details" }, element("summary", {}, "Table of all tokens"), tokenTable);
  tableDetails.addEventListener("toggle", drawTokenTable);
  const paneElements = panes.map((pane) => {
    const spans = pane.pieces.text.map((_, index) => tokenElement(pane.pieces, index));
    const section = element("section", { class: "icl-pane" }, element("h3", {}, pane.title),
      element("div", { class: "icl-tokens", role: "group", "aria-label": pane.title }, ...spans), element("p", { class: "icl-note" }, pane.note));
    return { spans, section };
  });

  const root = element(
    "div",
    { class: "icl-view" },
    element("h2", {}, data.title),
    controls,
    status,
    element(
      "div",
      { class: "icl-columns" },
      element("section", { class: "icl-left" },
        element("h3", { id: `${id}-grid-title` }, "Layers (rows) and heads (columns)"),
        scroller,
        element("p", { class: "icl-note icl-grid-note" })),
      element("section", { class: "icl-middle" },
        element("h3", { id: `${id}-tokens-title` }, "In context"), legend, tokens, note, tableDetails),
      element("aside", { class: "icl-right", "aria-label": "Zero-shot and sums" },
        ...paneElements.map((pane) => pane.section),
        element("section", {}, element("h3", {}, "Sums by source"), sums),
        headNumbers.length ? element("section", {}, element("h3", {}, "Norms in the residual stream"), heads) : ""),
    ),
    element("p", { class: "icl-note icl-precision" }),
  );

  function gridGroups() {
    if (state.grid === "all") return data.groups.map((_, g) => g);
    if (state.grid === "first") return quantities[state.quantity].grid;
    return [Number(state.grid)];
  }
  const firstTitle = () => {
    const names = quantities[state.quantity].grid.map((g) => data.groups[g]);
    if (names.length === 1) return names[0];
    return names.includes("separators") ? "all demonstrations with separators" : "all demonstrations";
  };
  function drawGridOptions() {
    const options = [["first", firstTitle()], ...data.groups.map((name, g) => [String(g), name]).filter(([g]) => groupPresent[g]), ["all", "sum of all sources"]];
    if (state.piece !== null) options.unshift(["token", `token at ${positionOf(data.pieces, state.piece)}: ${spoken(data.pieces.text[state.piece])}`]);
    gridSelect.replaceChildren(...options.map(([value, text]) => element("option", { value }, text)));
    gridSelect.value = state.grid;
  }
  function gridValue(q, at) {
    return state.grid === "token" ? unitValue(q, at, data.pieces.unit[state.piece]) : sum(gridGroups().map((g) => groupValue(q, at, g)));
  }
  const positionOf = (pieces, index) =>
    pieces.first[index] === pieces.last[index] ? `position ${pieces.first[index]}` : `positions ${pieces.first[index]} to ${pieces.last[index]}`;

  function drawGrid() {
    const q = quantities[state.quantity];
    const values = cells.map((_, at) => gridValue(q, at));
    const most = largest(values);
    cells.forEach((box, at) => {
      const row = Math.floor(at / nHeads), head = at % nHeads;
      paint(box, values[at], most);
      box.textContent = box.dataset.sign === "negative" ? MINUS : "";
      const text = `layer ${data.layers[row]}, head ${head}: ${format(values[at], q.signed)}`;
      box.setAttribute("aria-label", text);
      box.title = text;
      const chosen = row === state.row && head === state.head;
      box.setAttribute("aria-selected", String(chosen));
      box.tabIndex = chosen ? 0 : -1;
    });
    const shows = gridSelect.selectedOptions[0]?.textContent ?? "";
    root.querySelector(".icl-grid-note").textContent = `${q.title}: ${shows}. Deepest colour: ±${format(most, false)}. Arrow keys choose a head.`;
  }

  function describe(index) {
    const at = cell();
    const numbers = quantities.map((q) => `${q.title} ${format(unitValue(q, at, data.pieces.unit[index]), q.signed)}`);
    return `${positionOf(data.pieces, index)}, ${data.groups[data.pieces.group[index]]}, ${numbers.join(", ")}`;
  }

  function drawTokens() {
    const q = quantities[state.quantity], at = cell();
    const values = tokenElements.map((_, index) => pieceValue(q, at, index));
    const most = largest(values);
    tokenElements.forEach((span, index) => {
      paint(span, values[index], most);
      span.title = describe(index);
      span.setAttribute("aria-label", `${spoken(data.pieces.text[index])}, ${span.title}`);
      span.setAttribute("aria-selected", String(index === state.piece));
      span.tabIndex = index === state.focusPiece ? 0 : -1;
      span.classList.toggle("icl-recorded", data.pieces.first[index] <= data.recorded && data.recorded <= data.pieces.last[index]);
    });
    legend.replaceChildren(...legendItems(most, q.signed));
    note.textContent = q.note + " The framed token attends." + (data.byPiece ? " Click a token, or press Enter on it, to see it in every head; Escape ends that." : "");
    const paneMost = panes.map((pane) => largest(pane.pieces.text.map((_, i) => unitValue(pane, at, i))));
    panes.forEach((pane, p) => paneElements[p].spans.forEach((span, index) => {
      const value = unitValue(pane, at, index);
      paint(span, value, paneMost[p]);
      span.title = `${positionOf(pane.pieces, index)}, attention weight ${format(value, false)}`;
    }));
  }

  function legendItems(most, signed) {
    const swatch = (value) => {
      const box = element("span", { class: "icl-swatch" });
      paint(box, value, most);
      return element("span", { class: "icl-legend-item" }, box, format(value, signed));
    };
    return (signed ? [-most, -most / 2, 0, most / 2, most] : [0, most / 2, most]).map(swatch);
  }

  function row(...values) {
    return element("tr", {}, ...values.map((value, i) => element(i ? "td" : "th", i ? {} : { scope: "row" }, String(value))));
  }
  function headerRow(...titles) {
    return element("thead", {}, element("tr", {}, ...titles.map((title) => element("th", { scope: "col" }, title))));
  }

  function drawTables() {
    const at = cell();
    const present = data.groups.map((name, g) => [name, g]).filter(([, g]) => groupPresent[g]);
    sums.replaceChildren(
      element("caption", {}, `Layer ${data.layers[state.row]}, head ${state.head}`),
      headerRow("source", ...quantities.map((q) => q.title)),
      element("tbody", {}, ...present.map(([name, g]) => row(name, ...quantities.map((q) => format(groupValue(q, at, g), q.signed)))),
        row("sum", ...quantities.map((q) => format(sum(present.map(([, g]) => groupValue(q, at, g))), q.signed)))),
    );
    heads.replaceChildren(element("tbody", {}, ...headNumbers.map((n) => row(n.title, format(n.values[at], false)))));
    drawTokenTable();
  }

  function drawTokenTable() {
    if (!tableDetails.open) return tokenTable.replaceChildren();
    const at = cell();
    tokenTable.replaceChildren(
      element("caption", {}, `Layer ${data.layers[state.row]}, head ${state.head}`),
      headerRow("token", "position", "source", ...quantities.map((q) => q.title)),
      element("tbody", {}, ...data.pieces.text.map((text, i) => {
        const line = row(visible(text).replaceAll("\n", ""), positionOf(data.pieces, i).replace(/^positions? /, ""), data.groups[data.pieces.group[i]],
          ...quantities.map((q) => format(unitValue(q, at, data.pieces.unit[i]), q.signed)));
        line.firstChild.dir = "auto";
        return line;
      })),
    );
  }

  function drawPrecision() {
    const at = cell(), steps = quantities.map((q) => `${q.title} ±${format(q.steps[at] / 2, false)}`);
    root.querySelector(".icl-precision").textContent =
      `Numbers of tokens are rounded to ${data.bits} bits at each head: here ${steps.join(", ")}. Sums and norms are 32-bit floating point numbers, computed before that.`;
  }

  function drawStatus() {
    const q = quantities[state.quantity], at = cell();
    const order = tokenElements.map((_, i) => i).sort((a, b) => Math.abs(unitValue(q, at, data.pieces.unit[b]) || 0) - Math.abs(unitValue(q, at, data.pieces.unit[a]) || 0));
    const top = data.byPiece ? `; largest token “${spoken(data.pieces.text[order[0]])}” ${format(unitValue(q, at, data.pieces.unit[order[0]]), q.signed)}` : "";
    status.textContent = `Layer ${data.layers[state.row]}, head ${state.head}: ${q.title} of ${firstTitle()} ${format(sum(q.grid.map((g) => groupValue(q, at, g))), q.signed)}${top}.`;
  }

  function draw() {
    drawGridOptions();
    drawGrid();
    drawTokens();
    drawTables();
    drawPrecision();
    drawStatus();
  }

  function choose(rowIndex, head, focus) {
    [state.row, state.head] = [rowIndex, head];
    draw();
    if (focus) cells[cell()].focus();
    selection.set(data.layers[rowIndex], head);
  }
  function pin(index) {
    if (!data.byPiece) return;
    state.piece = state.piece === index ? null : index;
    state.grid = state.piece === null ? "first" : "token";
    draw();
    if (state.piece !== null) status.textContent = `The grid shows ${spoken(data.pieces.text[index])}, ${describe(index)}.`;
  }
  function moveToken(index, focus) {
    tokenElements[state.focusPiece].tabIndex = -1;
    state.focusPiece = index;
    tokenElements[index].tabIndex = 0;
    if (focus) tokenElements[index].focus();
  }

  quantitySelect.addEventListener("change", () => { state.quantity = Number(quantitySelect.value); draw(); });
  modeSelect.addEventListener("change", () => { state.summed = modeSelect.value === "summed"; draw(); });
  gridSelect.addEventListener("change", () => { state.grid = gridSelect.value; draw(); });

  /** The head at which the grid's sources contribute most. */
  function strongest() {
    const q = quantities[0];
    const values = cells.map((_, at) => Math.abs(sum(q.grid.map((g) => groupValue(q, at, g)))) || 0);
    return values.indexOf(Math.max(...values));
  }
  state.grid = "first";
  state.focusPiece = nPieces - 1;
  const begin = strongest();
  [state.row, state.head] = [Math.floor(begin / nHeads), begin % nHeads];
  function follow() {
    const rowIndex = data.layers.indexOf(selection.layer()), head = selection.head();
    if (rowIndex >= 0) state.row = rowIndex;
    if (Number.isInteger(head) && head >= 0 && head < nHeads) state.head = head;
    draw();
    scrollToChosen();
  }
  function scrollToChosen() {
    const box = cells[cell()];
    scroller.scrollTop = box.offsetTop - scroller.clientHeight / 2;
    scroller.scrollLeft = box.offsetLeft - scroller.clientWidth / 2;
  }
  el.replaceChildren(root);
  follow();
  selection.set(data.layers[state.row], state.head);
  return follow;
}

/** Show the data inside of a page. */
export function renderPage(page) {
  const data = JSON.parse(page.getElementById("data").textContent);
  const at = page.defaultView.location.hash.match(/^#layer=(\d+)&head=(\d+)$/);
  mount(data, page.getElementById("view"), { layer: () => (at ? Number(at[1]) : null), head: () => (at ? Number(at[2]) : null), set: () => {} });
}

/** Show the data of an anywidget. */
function render({ model, el }) {
  const host = document.body;
  const isDark = host.dataset.jpThemeLight === "false" || host.classList.contains("vscode-dark");
  const isLight = host.dataset.jpThemeLight === "true" || host.classList.contains("vscode-light");
  el.classList.add("icl-widget");
  if (isDark || isLight) el.style.colorScheme = isDark ? "dark" : "light";
  const follow = mount(JSON.parse(model.get("data")), el, {
    layer: () => model.get("layer"),
    head: () => model.get("head"),
    set: (layer, head) => {
      if (model.get("layer") === layer && model.get("head") === head) return;
      model.set("layer", layer);
      model.set("head", head);
      model.save_changes();
    },
  });
  model.on("change:layer", follow);
  model.on("change:head", follow);
  return () => {
    model.off("change:layer", follow);
    model.off("change:head", follow);
  };
}

export default { render };
