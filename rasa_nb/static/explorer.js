// The explorer in the browser; its Python side is nbs/02m_explorer.ipynb, which says what passes between them.
// Nothing is imported: nothing is fetched from elsewhere.

// --- Small things --------------------------------------------------------------------------------

function make(tag, options = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(options)) {
    if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

const percent = fraction => `${100 * fraction}%`;

// Bytes of Python as numbers: the buffer may start anywhere, a Float32Array may not.
function floats({buffer, byteOffset, byteLength}) {
  return new Float32Array(buffer.slice(byteOffset, byteOffset + byteLength));
}

const cellOf = ([x, y], [rows, columns]) => [
  Math.min(rows - 1, Math.floor(y * rows)),
  Math.min(columns - 1, Math.floor(x * columns)),
];

// Values from -1 to 1 as pixels, one for each cell; `colors` holds 256 of them, three bytes each.
function paint(canvas, values, [rows, columns], colors) {
  const picture = new ImageData(columns, rows), pixels = picture.data;
  values.forEach((value, i) => {
    const step = 3 * Math.max(0, Math.min(255, Math.floor((value + 1) * 128)));
    for (let channel = 0; channel < 3; channel++) pixels[4 * i + channel] = colors.getUint8(step + channel);
    pixels[4 * i + 3] = 255;
  });
  Object.assign(canvas, {width: columns, height: rows});
  canvas.getContext("2d").putImageData(picture, 0, 0);
}

function frame(mark, [row, column], [rows, columns]) {
  mark.style.left = percent(column / columns);
  mark.style.top = percent(row / rows);
  mark.style.width = percent(1 / columns);
  mark.style.height = percent(1 / rows);
}

function place(mark, [x, y]) {
  mark.style.left = percent(x);
  mark.style.top = percent(y);
}

// --- A panel: a picture with marks over it and a caption below -----------------------------------
// The Tab key reaches it; then the arrow keys move by one patch, and with Shift by four.
// `onPoint` gets the point as fractions of width and height, and "press" or "hover".

const ARROWS = {ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0]};

function makePanel(picture, label, marks, onPoint, grid) {
  const about = {className: "area", tabIndex: 0, role: "application", "aria-label": label};
  const area = make("div", about, picture, ...marks);
  const caption = make("figcaption");
  let at = [.5, .5];

  const move = (x, y, how) => {
    at = [x, y].map(f => Math.max(0, Math.min(1 - 1e-6, f)));
    onPoint(at, how);
  };
  const fromPointer = (event, how) => {
    const box = area.getBoundingClientRect();
    move((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height, how);
  };
  area.onpointerdown = event => {
    area.setPointerCapture(event.pointerId);
    area.focus({preventScroll: true});
    fromPointer(event, "press");
    event.preventDefault();
  };
  area.onpointermove = event => fromPointer(event, event.buttons & 1 ? "press" : "hover");
  area.onkeydown = event => {
    const step = ARROWS[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();   // JupyterLab would go to another cell
    const [rows, columns] = grid();
    const [row, column] = cellOf(at, [rows, columns]);
    const far = event.shiftKey ? 4 : 1;
    move((column + far * step[1] + .5) / columns, (row + far * step[0] + .5) / rows, "press");
  };
  return {area, caption, figure: make("figure", {}, area, caption), set: point => { at = point; }};
}

// --- Controls: each has a label, and is left out where there is nothing to choose ----------------

function makeSelect(label, key, options, choose) {
  const box = make("select", {"aria-label": label}, ...options.map(([, text]) => make("option", {}, text)));
  box.onchange = () => choose({[key]: options[box.selectedIndex][0]});
  const sync = choice => { box.selectedIndex = options.findIndex(([value]) => value === choice[key]); };
  return {node: make("label", {}, label + " ", box), sync};
}

function makeSwitches(encoders, choose) {
  const boxes = encoders.map(() => make("input", {type: "checkbox"}));
  boxes.forEach(box => {
    box.onchange = () => {
      const shown = encoders.filter((_, i) => boxes[i].checked);
      if (shown.length) choose({shown});
      else box.checked = true;   // one stays
    };
  });
  const labels = boxes.map((box, i) => make("label", {}, box, " " + encoders[i]));
  const sync = choice => boxes.forEach((box, i) => { box.checked = choice.shown.includes(encoders[i]); });
  return {node: make("span", {role: "group", "aria-label": "Encoders shown"}, ...labels), sync};
}

// Directions of token space, the strongest first: moved to the left, the slider puts them back.
function makeSlider(most, choose) {
  const range = make("input", {type: "range", min: 0, max: most, step: 1, "aria-label": "Directions removed"});
  const words = make("output");
  const tell = rank => { words.textContent = `${rank} of ${most}`; };
  const take = () => { tell(range.value); choose({rank: Number(range.value)}); };
  range.oninput = take;
  range.onkeydown = event => {   // JupyterLab keeps the arrow keys from moving it
    const step = ARROWS[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    range.value = Number(range.value) + step[1] - step[0];   // up and right take out more
    take();
  };
  const sync = choice => { range.value = choice.rank; tell(choice.rank); };
  return {node: make("label", {className: "slider"}, "Directions removed ", range, " ", words), sync};
}

function makeControls(about, choose, download) {
  const controls = [], images = about.images.map(name => [name, name]);
  const blocks = Array.from({length: about.layers}, (_, i) => [i, `block ${i}`]);
  if (images.length > 1) {
    controls.push(makeSelect("Image", "query", images, choose));
    controls.push(makeSelect("Second image", "target", [["", "none"], ...images], choose));
  }
  if (about.layers) controls.push(makeSelect("Layer", "layer", [["given", "as given"], ...blocks], choose));
  if (about.encoders.length > 1) controls.push(makeSwitches(about.encoders, choose));
  if (about.rank) controls.push(makeSlider(about.rank, choose));
  const title = "Save what is shown as a PNG file";
  const button = make("button", {type: "button", title, onclick: download}, "Export PNG");
  const bar = make("div", {className: "controls"}, ...controls.map(control => control.node), button);
  return {bar, sync: choice => controls.forEach(control => control.sync(choice))};
}

// --- Maps: a row for each image, in it a panel for each encoder shown, kept from answer to answer --
// A pointer over any of them, or the arrow keys, reads all of them at that place, in both rows.

function makeMap(name, read, grid) {
  const canvas = make("canvas");
  const query = make("div", {className: "mark"});
  const hover = make("div", {className: "mark hover", hidden: true});
  const label = `Similarity map of ${name}. Arrow keys read its values.`;
  const panel = makePanel(canvas, label, [query, hover], read, grid);
  const title = make("strong"), value = make("output");
  panel.caption.append(title, value);
  return {...panel, canvas, query, hover, title, value};
}

const valueAt = (panel, cell, [, columns]) => panel.numbers[cell[0] * columns + cell[1]].toFixed(2);

function fillMap(panel, map, row, colors, second) {
  panel.numbers = floats(map.values);
  paint(panel.canvas, panel.numbers, map.grid, colors);
  frame(panel.query, map.cell, map.grid);
  panel.query.classList.toggle("ring", second);
  panel.area.style.aspectRatio = row.size.join("/");
  panel.title.textContent = map.name + (map.label ? `, ${map.label}` : "");
  panel.value.textContent = second ? `\u25cb ${valueAt(panel, map.cell, map.grid)}` : "";
  panel.value.title = second ? "similarity at the ring" : "";
  panel.canvas.dataset.cell = map.cell;   // the place of the chosen patch
}

// `draw` shows the maps of one image; `readAll` marks a place in all of them and tells their values.
function makeMaps(region, cursorMark, colors, read, second) {
  let panels = {}, row;
  const gridOf = name => () => row.maps.find(map => map.name === name).grid;

  const readOne = (map, point) => {
    const panel = panels[map.name], cell = cellOf(point, map.grid);
    frame(panel.hover, cell, map.grid);
    panel.hover.hidden = false;
    panel.value.textContent = valueAt(panel, cell, map.grid);
    panel.value.title = "value under the cursor";
    return `${map.name} ${panel.value.textContent}`;
  };
  const readAll = point => {
    place(cursorMark, point);
    cursorMark.hidden = false;
    return row.maps.map(map => readOne(map, point));
  };
  const draw = next => {
    row = next;
    const kept = ({name}) => [name, panels[name] ?? makeMap(name, read, gridOf(name))];
    panels = Object.fromEntries(row.maps.map(kept));
    const figures = Object.values(panels).map(panel => panel.figure), old = region.children;
    const same = figures.length === old.length && figures.every((figure, i) => figure === old[i]);
    if (!same) region.replaceChildren(...figures);
    row.maps.forEach(map => fillMap(panels[map.name], map, row, colors, second));
  };
  const leave = () => {   // the pointer is elsewhere: the values at the ring again
    cursorMark.hidden = true;
    for (const map of row.maps) {
      panels[map.name].hover.hidden = true;
      fillMap(panels[map.name], map, row, colors, second);
    }
  };
  return {draw, readAll, leave};
}

// --- The color bar, and what is chosen in words: for the eye, and for screen readers -------------

function makeScale(about, colors) {
  const bar = make("canvas", {className: "bar", "aria-hidden": "true"});
  paint(bar, Float32Array.from({length: 256}, (_, i) => (i + .5) / 128 - 1), [1, 256], colors);
  const ticks = make("div", {className: "ticks"}, ...["-1", "0", "1"].map(text => make("span", {}, text)));
  const words = make("span", {}, `${about.scale}; one scale for all maps`);
  return make("div", {className: "scale"}, make("div", {}, bar, ticks), words);
}

function describe(answer) {
  if (answer.error) return answer.error;
  const places = new Map();   // encoders of one grid are named together
  for (const {name, cell, grid} of answer.rows[0].maps) {
    const where = `row ${cell[0] + 1} of ${grid[0]}, column ${cell[1] + 1} of ${grid[1]}`;
    places.set(where, [...(places.get(where) ?? []), name]);
  }
  const several = places.size > 1;
  const parts = [...places].map(([where, names]) => several ? `${where} (${names.join(", ")})` : where);
  return `Patch of ${answer.query}: ${parts.join("; ")}`;
}

// A line that is spoken: late enough that a drag does not speak at every step.
function makeStatus() {
  const node = make("div", {className: "status", role: "status"});
  let timer;
  const say = text => {
    clearTimeout(timer);
    timer = setTimeout(() => { node.textContent = text; }, 100);
  };
  return {node, say};
}

// The patch of the finest grid, which the arrow keys step by.
function finest(answer) {
  const grids = answer.rows[0].maps.map(map => map.grid);
  return grids.reduce((a, b) => a[0] * a[1] >= b[0] * b[1] ? a : b);
}

function saveFile(bytes, name) {
  const url = URL.createObjectURL(new Blob([bytes], {type: "image/png"}));
  make("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}

// --- Put together: anywidget calls `render` for each view on the page ----------------------------
// The dot moves with the pointer at once. Maps follow when the answer comes, and turn pale where that takes
// longer than a third of a second, as when a layer is computed for the first time.

function render({model, el}) {
  const about = model.get("about"), colors = model.get("colors"), id = String(Math.random()), urls = {};
  for (const [name, bytes] of Object.entries(model.get("pictures"))) {
    urls[name] = URL.createObjectURL(new Blob([bytes]));
  }
  const choice = () => model.get("choice"), answered = () => model.get("answer");
  const choose = change => { model.set("choice", {...choice(), ...change}); model.save_changes(); };

  const picture = make("img", {alt: "", draggable: false}), other = make("img", {alt: "", draggable: false});
  const dot = make("div", {className: "dot"});
  const label = "Image: choose a patch by pointer, or move it with the arrow keys";
  const press = (at, how) => { if (how === "press") choose({at}); };
  const query = makePanel(picture, label, [dot], press, () => finest(answered()));
  const ring = make("div", {className: "dot ring"}), cursor = make("div", {className: "dot small", hidden: true});
  const both = make("div", {className: "area"}, other, ring, cursor);
  const target = make("figure", {}, both, make("figcaption"));
  const status = makeStatus(), regions = [0, 1].map(() => make("div", {className: "maps"}));
  const note = make("div", {className: "note"});
  const second = make("div", {hidden: true}, make("div", {className: "panels"}, target, regions[1]), note);

  let readAt;   // where the pointer is over the maps
  const cursors = [make("div", {className: "dot small", hidden: true}), cursor];
  const shownRows = () => rows.slice(0, answered().rows.length);
  const readAll = () => shownRows().flatMap(row => row.readAll(readAt));
  const read = point => {
    readAt = point;
    status.say("Under the cursor: " + readAll().join(", "));
  };
  const leave = () => {
    readAt = undefined;
    shownRows().forEach(row => row.leave());
  };
  const rows = regions.map((region, i) => makeMaps(region, cursors[i], colors, read, i === 1));
  regions.forEach(region => { region.onpointerleave = leave; });
  query.area.append(cursors[0]);

  const controls = makeControls(about, choose, () => model.send({kind: "export", id}));
  const first = make("div", {className: "panels"}, query.figure, regions[0]);
  const style = `--picture: ${about.width}px`;   // and JupyterLab leaves the keys to us
  const look = {className: "rasa-explorer", style, "data-lm-suppress-shortcuts": "true"};
  const all = make("div", look, controls.bar, first, second, makeScale(about, colors), status.node);
  el.append(all);

  let waiting, shown;
  const showPictures = ({query: name, target: below}) => {
    picture.src = urls[name];
    query.caption.textContent = name;
    second.hidden = below === "" || below === name;
    other.src = urls[below || name];
    target.lastChild.textContent = below;
    note.textContent = `\u25cb the place in ${below} where the point is in ${name}. Where something else is seen ` +
      "there, red at the ring is similarity by position.";
  };
  const showChoice = () => {
    place(dot, choice().at);
    place(ring, choice().at);
    query.set(choice().at);
    controls.sync(choice());
    clearTimeout(waiting);
    waiting = setTimeout(() => regions.forEach(region => region.setAttribute("aria-busy", "true")), 300);
    const {query: name, target: below} = choice();
    if (`${name} ${below}` === shown) return;   // the same throughout a drag
    shown = `${name} ${below}`;
    showPictures(choice());
  };
  const showAnswer = () => {
    clearTimeout(waiting);
    regions.forEach(region => region.setAttribute("aria-busy", "false"));
    status.say(describe(answered()));
    if (answered().error) return;
    answered().rows.forEach((row, i) => rows[i].draw(row));
    if (readAt) readAll();
  };
  const received = (message, buffers) => { if (message.id === id) saveFile(buffers[0], message.name); };

  model.on("change:choice", showChoice);
  model.on("change:answer", showAnswer);
  model.on("msg:custom", received);
  showChoice();
  showAnswer();
  return () => {   // the view is closed
    model.off("change:choice", showChoice);
    model.off("change:answer", showAnswer);
    model.off("msg:custom", received);
    Object.values(urls).forEach(URL.revokeObjectURL);
  };
}

export default {render};
