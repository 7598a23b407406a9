// The picture with its classes on it: all that the page does without its server.

const CAMERA_SIDE = 960; // pixels of a frame's longer side that is sent
const OPAQUE = 0xff000000; // of a pixel as one number, as all browsers store it

async function inflate(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function loadImage(uri) {
  const image = new Image();
  image.src = uri;
  await image.decode();
  return image;
}

function share(value) {
  return value > 0 && value < 0.0005 ? "< 0.1 %" : `${(100 * value).toFixed(1)} %`;
}

export default {
  template: `
    <div class="demo" @dragover.prevent="over = true" @dragleave="over = false" @drop.prevent="drop">
      <section class="stage" :class="{ over, empty: !view }" aria-label="Result">
        <div v-show="view === 'image' || view === 'camera'" class="layers"
          :style="{ '--ratio': ratio }">
          <canvas ref="image" class="image"></canvas>
          <canvas ref="overlay" class="overlay" role="img" aria-label="The classes"
            :style="{ opacity }" @pointermove="point" @pointerleave="pointed = ''"></canvas>
          <span v-show="pointed" class="pointed">{{ pointed }}</span>
        </div>
        <video v-if="view === 'video'" class="result" :src="url" controls loop autoplay muted
          playsinline></video>
        <button v-if="!view" type="button" class="invitation" @click="choose">
          <strong>Drop an image or a video here</strong> paste one, or choose a file
          <small>{{ invitation }}</small>
        </button>
        <video ref="camera" hidden muted playsinline></video>
      </section>
      <aside v-show="classes.length">
        <dl class="facts">
          <div v-for="[term, value] in facts" :key="term"><dt>{{ term }}</dt><dd>{{ value }}</dd></div>
        </dl>
        <label class="opacity">Opacity <output>{{ Math.round(100 * opacity) }} %</output>
          <input type="range" min="0" max="1" step="0.01" v-model.number="opacity"
            @change="$emit('opacity', opacity)" />
        </label>
        <p v-if="view === 'video'" class="muted">
          A video is drawn once: give it again for another opacity.
        </p>
        <div class="bulk" v-show="view !== 'video'">
          <button type="button" @click="toggleAll(true)">Show all</button>
          <button type="button" @click="toggleAll(false)">Hide all</button>
        </div>
        <ul class="classes">
          <li v-for="row in rows" :key="row.name" :style="{ '--share': row.share }">
            <label>
              <input type="checkbox" :checked="row.color && !hidden[row.name]"
                :disabled="!row.color || view === 'video'"
                @change="toggle(row.name, $event.target.checked)" />
              <span class="swatch" :style="{ background: row.css }"></span>
              <span class="class-name">{{ row.name }}</span>
              <span class="share">{{ row.text }}</span>
            </label>
          </li>
        </ul>
      </aside>
    </div>
  `,
  props: { uploader: Number, invitation: String },
  data() {
    return {
      view: "", // image, camera, video
      over: false,
      classes: [], // name and colour, void without one
      shares: [],
      order: [], // of the rows
      hidden: {}, // by name, so that they stay hidden with other weights
      opacity: 0.5,
      pointed: "",
      facts: [],
      ratio: 1, // of width to height
      url: "",
    };
  },
  computed: {
    rows() {
      return this.order.map((index) => {
        const [name, color] = this.classes[index];
        const css = color ? `rgb(${color.join()})` : "none";
        return { name, color, css, share: this.shares[index], text: share(this.shares[index]) };
      });
    },
  },
  created() {
    // Not reactive: large, or of the browser.
    this.labels = new Uint8Array();
    this.stream = this.frame = null;
    this.given = 0; // images and videos so far
    this.shown = this.fps = 0;
    this.waiting = false; // for the answer to a frame
  },
  mounted() {
    window.addEventListener("paste", this.paste);
  },
  unmounted() {
    window.removeEventListener("paste", this.paste);
    this.stopCamera();
  },
  methods: {
    drop(event) {
      this.over = false;
      this.take(event.dataTransfer.files);
    },
    paste(event) {
      this.take(event.clipboardData.files);
    },
    choose() {
      getElement(this.uploader).$refs.qRef.pickFiles();
    },
    take(files) {
      const uploader = getElement(this.uploader).$refs.qRef;
      if (files.length) {
        uploader.reset();
        uploader.addFiles([files[0]]);
      }
    },

    // Called by the server.
    async show(answer) {
      const fromCamera = !answer.image;
      if (!fromCamera) this.given += 1;
      const given = this.given;
      const labels = await inflate(answer.labels);
      const image = fromCamera ? this.frame : await loadImage(answer.image);
      if (fromCamera) this.waiting = false;
      if (given !== this.given || (fromCamera && !this.stream)) return; // overtaken meanwhile
      if (!fromCamera) this.stopCamera();
      for (const canvas of [this.$refs.image, this.$refs.overlay]) {
        if (canvas.width !== answer.columns || canvas.height !== answer.rows) {
          canvas.width = answer.columns;
          canvas.height = answer.rows;
        }
      }
      this.$refs.image.getContext("2d").drawImage(image, 0, 0);
      this.labels = labels;
      this.ratio = answer.columns / answer.rows;
      this.view = fromCamera ? "camera" : "image";
      this.facts = [
        fromCamera ? ["rate", `${this.count().toFixed(1)} fps`] : ["file", answer.name],
        ["size", `${answer.width} × ${answer.height}`],
        ["network", `${answer.network_ms.toFixed(1)} ms`],
        ["whole", `${answer.whole_ms.toFixed(1)} ms`],
      ];
      this.list(answer, fromCamera);
      this.paint();
      if (fromCamera) this.sendFrame();
    },
    showVideo(answer) {
      this.given += 1;
      this.stopCamera();
      this.view = "video";
      this.url = answer.url;
      this.facts = [
        ["file", answer.name],
        ["size", `${answer.width} × ${answer.height}`],
        ["frames", answer.frames],
        ["a frame", `${answer.whole_ms.toFixed(1)} ms`],
      ];
      this.list(answer);
    },

    // Rows go by share, but keep their places while the camera runs.
    list(answer, keep = false) {
      const same = String(answer.classes) === String(this.classes);
      this.classes = answer.classes;
      this.shares = answer.shares;
      if (keep && same) return;
      this.order = [...this.classes.keys()].sort((a, b) => this.shares[b] - this.shares[a]);
    },
    toggle(name, visible) {
      this.hidden[name] = !visible;
      this.paint();
    },
    toggleAll(visible) {
      for (const [name] of this.classes) this.hidden[name] = !visible;
      this.paint();
    },
    paint() {
      const { width, height } = this.$refs.overlay;
      const words = new Uint32Array(256);
      this.classes.forEach(([name, color], index) => {
        if (!color || this.hidden[name]) return;
        words[index] = OPAQUE | (color[2] << 16) | (color[1] << 8) | color[0];
      });
      const pixels = new ImageData(width, height);
      const target = new Uint32Array(pixels.data.buffer);
      this.labels.forEach((label, index) => (target[index] = words[label]));
      this.$refs.overlay.getContext("2d").putImageData(pixels, 0, 0);
    },
    point(event) {
      const { width, height } = this.$refs.overlay;
      const box = this.$refs.overlay.getBoundingClientRect();
      const x = Math.floor(((event.clientX - box.left) / box.width) * width);
      const y = Math.floor(((event.clientY - box.top) / box.height) * height);
      this.pointed = this.classes[this.labels[y * width + x]]?.[0] ?? "";
    },

    async toggleCamera() {
      if (this.stream) return this.stopCamera();
      const video = { width: { ideal: 640 }, facingMode: "environment" };
      try {
        this.stream = await navigator.mediaDevices.getUserMedia({ video });
        this.$refs.camera.srcObject = this.stream;
        await this.$refs.camera.play();
      } catch (error) {
        this.stopCamera();
        this.$emit("trouble", `the browser gives no webcam (${error.message}): connect or allow one`);
        return;
      }
      this.shown = 0;
      this.order = [];
      this.classes = [];
      this.$emit("camera", true);
      if (!this.waiting) this.sendFrame();
    },
    stopCamera(refused = false) {
      if (refused) this.waiting = false;
      if (!this.stream) return;
      this.stream.getTracks().forEach((track) => track.stop());
      this.stream = null;
      this.$emit("camera", false);
    },
    sendFrame() {
      this.waiting = true;
      const camera = this.$refs.camera;
      const scale = Math.min(1, CAMERA_SIDE / Math.max(camera.videoWidth, camera.videoHeight));
      this.frame = document.createElement("canvas");
      this.frame.width = Math.round(scale * camera.videoWidth);
      this.frame.height = Math.round(scale * camera.videoHeight);
      const { width, height } = this.frame;
      this.frame.getContext("2d").drawImage(camera, 0, 0, width, height);
      this.$emit("frame", this.frame.toDataURL("image/jpeg", 0.9));
    },
    // Frames a second, smoothed.
    count() {
      const now = performance.now();
      const rate = 1000 / (now - this.shown);
      this.fps = this.fps && this.shown ? 0.9 * this.fps + 0.1 * rate : rate;
      this.shown = now;
      return this.fps;
    },
  },
};
