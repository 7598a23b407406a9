const score = (value) => (value === null ? "–" : value.toFixed(3));

// Confusion matrix
const matrix = element("matrix");
const cells = [...matrix.querySelectorAll("tbody td")];
const columns = matrix.tBodies[0].rows[0].cells.length - 1;
let current = 0;

function select(index) {
  cells[current].classList.remove("current");
  current = index;
  cells[current].classList.add("current");
  element("readout").textContent = cells[current].title;
}

matrix.addEventListener("pointerover", (event) => {
  const index = cells.indexOf(event.target);
  if (index >= 0) select(index);
});
matrix.addEventListener("focus", () => select(current));
matrix.addEventListener("keydown", (event) => {
  const column = current % columns;
  const step = {
    ArrowLeft: column > 0 ? -1 : 0,
    ArrowRight: column < columns - 1 ? 1 : 0,
    ArrowUp: -columns,
    ArrowDown: columns,
  }[event.key];
  if (step === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  if (!cells[current + step]) return;
  select(current + step);
  cells[current].scrollIntoView({ block: "nearest", inline: "nearest" });
});

// List of images
const list = element("rows");
const classes = [...element("class").options].slice(1).map((option) => option.text);
const rows = [...list.children].map((item) => ({
  item,
  name: item.dataset.name,
  miou: JSON.parse(item.dataset.miou),
  iou: JSON.parse(item.dataset.iou),
}));
let shown = rows;

const byName = (a, b) => (a.name < b.name ? -1 : a.name > b.name ? 1 : 0);

function update() {
  const chosen = JSON.parse(element("class").value);
  const text = element("text").value.toLowerCase();
  const order = element("order").value;
  const value = (row) => (chosen === null ? row.miou : row.iou[chosen]);
  const matches = (row) =>
    row.name.toLowerCase().includes(text) && (chosen === null || row.iou[chosen] !== null);
  const sign = order === "worst" ? 1 : -1;
  rows.sort((a, b) => (order === "name" ? 0 : compare(value(a), value(b), sign)) || byName(a, b));
  shown = rows.filter(matches);
  for (const row of rows) {
    row.item.hidden = !matches(row);
    row.item.querySelector(".class-score").textContent =
      chosen === null ? "" : `${classes[chosen]} ${score(row.iou[chosen])}`;
  }
  list.append(...rows.map((row) => row.item));
  element("count").textContent = `${shown.length} of ${rows.length} images`;
  element("nothing").hidden = shown.length > 0;
}

for (const id of ["order", "class", "text"]) element(id).addEventListener("input", update);
update();

// Large view
const large = element("large");
const swatches = document.querySelectorAll(".legend .swatch");
let position = 0;

function show(index) {
  position = (index + shown.length) % shown.length;
  const row = shown[position];
  element("large-name").textContent = row.name;
  element("large-scores").textContent = `mIoU ${score(row.miou)} · ${position + 1} of ${shown.length}`;
  const panes = [...row.item.querySelectorAll(".pane")].map((pane) => pane.cloneNode(true));
  for (const pane of panes) pane.querySelector("img").loading = "eager";
  element("large-panes").replaceChildren(...panes);
  const present = row.iou.map((iou, index) => ({ iou, index })).filter(({ iou }) => iou !== null);
  const chips = present.sort((a, b) => a.iou - b.iou).map(({ iou, index }) => {
    const chip = document.createElement("li");
    chip.append(swatches[index].cloneNode(), `${classes[index]} ${score(iou)}`);
    return chip;
  });
  element("large-classes").replaceChildren(...chips);
}

list.addEventListener("click", (event) => {
  const button = event.target.closest(".panes");
  if (!button) return;
  show(shown.findIndex((row) => row.item.contains(button)));
  large.showModal();
});
element("previous").addEventListener("click", () => show(position - 1));
element("next").addEventListener("click", () => show(position + 1));
element("close").addEventListener("click", () => large.close());
large.addEventListener("keydown", (event) => {
  if (event.key === "ArrowLeft") show(position - 1);
  if (event.key === "ArrowRight") show(position + 1);
});
// Return the focus to the image viewed last, which need not be the one opened first.
large.addEventListener("close", () => shown[position].item.querySelector(".panes").focus());
