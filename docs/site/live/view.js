// Draws an image with its label map, lists the classes, and names the class under the cursor.

const OPAQUE = 0xff000000; // of a pixel as one number, as all browsers store it
const MOVES = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STEPS = 50; // of the cursor along the longer side
const $ = (id) => document.getElementById(id);

function percent(value) {
  return value > 0 && value < 0.0005 ? "< 0.1 %" : `${(100 * value).toFixed(1)} %`;
}

export class View {
  constructor() {
    this.classes = [];
    this.hidden = new Set(); // names, so that they stay hidden with other weights
    this.cursor = null;
    $("opacity").addEventListener("input", () => this.restyle());
    for (const radio of document.querySelectorAll("[name=view]")) radio.addEventListener("change", () => this.restyle());
    $("show-all").addEventListener("click", () => this.toggle(this.classes, true));
    $("hide-all").addEventListener("click", () => this.toggle(this.classes, false));
    for (const canvas of [$("image"), $("overlay")]) {
      for (const type of ["pointermove", "pointerdown"]) canvas.addEventListener(type, (event) => this.follow(event));
      canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && this.moveTo(null));
    }
    $("layers").addEventListener("keydown", (event) => this.step(event));
    $("layers").addEventListener("blur", () => this.moveTo(null));
    this.restyle(); // browsers keep the values of controls over a reload
  }

  // Lists the classes of a network and void, which has no color.
  setClasses(classes, colors) {
    this.colors = [...colors, null];
    this.classes = [...classes, "void"];
    this.rows = this.classes.map((name, index) => {
      const item = document.createElement("li");
      item.innerHTML = `<label><input type="checkbox"><span class="swatch"></span>
        <span class="class-name"></span><span class="share"></span></label>`;
      const box = item.querySelector("input");
      const color = this.colors[index];
      box.disabled = !color;
      box.checked = color && !this.hidden.has(name);
      box.addEventListener("change", () => this.toggle([name], box.checked));
      item.querySelector(".class-name").textContent = name;
      if (color) item.querySelector(".swatch").style.background = `rgb(${color.join()})`;
      return { item, box, share: item.querySelector(".share") };
    });
    $("classes").replaceChildren(...this.rows.map((row) => row.item));
  }

  setEmpty(empty) {
    document.querySelector("main").classList.toggle("empty", empty);
    $("invitation").hidden = !empty;
    $("layers").hidden = empty;
    if (empty) this.result = null;
  }

  toggle(names, visible) {
    for (const name of names) visible ? this.hidden.delete(name) : this.hidden.add(name);
    this.rows.forEach((row, index) => (row.box.checked = this.colors[index] && !this.hidden.has(this.classes[index])));
    this.paint();
  }

  restyle() {
    const view = document.querySelector("[name=view]:checked").value;
    const opacity = $("opacity").value;
    $("layers").dataset.view = view;
    $("percent").value = `${opacity} %`;
    $("overlay").style.opacity = view === "overlay" ? opacity / 100 : 1;
    $("opacity").disabled = view !== "overlay";
    $("opacity").parentElement.classList.toggle("off", view !== "overlay");
  }

  // Shows a result of the network. Rows go by share, but keep their places in a `stream`.
  show(result, stream) {
    const { bitmap, width, height, counts } = result;
    this.result = result;
    this.setEmpty(false);
    for (const canvas of [$("image"), $("overlay")])
      if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    $("image").getContext("2d", { alpha: false }).drawImage(bitmap, 0, 0);
    bitmap.close();
    $("layers").style.setProperty("--ratio", width / height);
    const shares = counts.map((count) => count / (width * height));
    this.rows.forEach((row, index) => {
      row.share.textContent = percent(shares[index]);
      row.item.style.setProperty("--share", shares[index]);
    });
    if (!stream || !this.sorted) {
      const order = [...shares.keys()].sort((a, b) => shares[b] - shares[a]);
      $("classes").append(...order.map((index) => this.rows[index].item));
    }
    this.sorted = stream;
    this.paint();
    this.moveTo(this.cursor);
  }

  paint() {
    if (!this.result) return;
    const { labels, width, height } = this.result;
    const words = new Uint32Array(256);
    this.colors.forEach((color, index) => {
      if (color && !this.hidden.has(this.classes[index])) words[index] = OPAQUE | (color[2] << 16) | (color[1] << 8) | color[0];
    });
    const pixels = new ImageData(width, height);
    const target = new Uint32Array(pixels.data.buffer);
    for (let i = 0; i < target.length; i++) target[i] = words[labels[i]];
    $("overlay").getContext("2d").putImageData(pixels, 0, 0);
  }

  // The overlay as it is shown, as a canvas.
  compose() {
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: this.result.width, height: this.result.height });
    const context = canvas.getContext("2d");
    context.drawImage($("image"), 0, 0);
    context.globalAlpha = $("opacity").value / 100;
    context.drawImage($("overlay"), 0, 0);
    return canvas;
  }

  follow(event) {
    const box = event.currentTarget.getBoundingClientRect();
    this.moveTo([(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height], event.currentTarget.id === "image");
  }

  step(event) {
    const move = MOVES[event.key];
    if (!move || !this.result) return;
    event.preventDefault();
    const { width, height } = this.result;
    const step = Math.max(width, height) / STEPS;
    const [x, y] = this.cursor ?? [0.5, 0.5];
    const clamp = (value) => Math.min(Math.max(value, 0), 0.9999);
    this.moveTo(this.cursor ? [clamp(x + (move[0] * step) / width), clamp(y + (move[1] * step) / height)] : [x, y], true);
  }

  // Names the class at a position, each coordinate from 0 to 1; null hides the name.
  moveTo(cursor, marked = !$("marker").hidden) {
    this.cursor = cursor;
    $("marker").hidden = !cursor || !marked;
    $("pointed").hidden = !cursor;
    if (!cursor || !this.result) return;
    const { labels, width, height } = this.result;
    const [x, y] = [Math.floor(cursor[0] * width), Math.floor(cursor[1] * height)];
    const name = this.classes[labels[y * width + x]] ?? "";
    if ($("pointed").value !== name) $("pointed").value = name; // read out only when it changes
    Object.assign($("marker").style, { left: `${100 * cursor[0]}%`, top: `${100 * cursor[1]}%` });
  }
}
