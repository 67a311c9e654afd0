/**
 * The collections of this server (its vector stores): choosing, creating, and following the one that is chosen.
 *
 * It is polled while the page can be seen: often while something is under way, seldom otherwise.
 */

import { bar, byId, counted, el, formatBytes, formatCount } from "./dom.js";
import { FileList } from "./files.js";
import { clearError, showError } from "./notices.js";

const POLL_MS = { ingesting: 700, computing: 2000, unreachable: 4000, idle: 15000 };
const STORES = "v1/vector_stores";
const storePath = (id) => `${STORES}/${encodeURIComponent(id)}`;
const nameOf = (store) => (store.name || store.id) + (store.status === "expired" ? " (expired)" : "");

export class Collections {
  #api;
  #stores = [];
  #chosen = null; // a vector store object
  #timer = 0;
  #isLive = true; // false: this server has fixed collections and no routes for them

  files;

  constructor(api) {
    this.#api = api;
    this.files = new FileList(api, () => this.follow());
    byId("collection").addEventListener("change", (event) => this.choose(event.target.value));
    byId("new-collection").addEventListener("click", () => this.#toggleForm());
    byId("create").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#create(byId("collection-name").value.trim());
    });
    document.addEventListener("visibilitychange", () => document.hidden || this.follow());
  }

  /** The chosen vector store's id; null: none, the server's own choice holds. */
  get chosenId() {
    return this.#chosen?.id ?? null;
  }

  get canAsk() {
    return this.#chosen !== null || !this.#isLive;
  }

  /** Lists the collections and chooses: the one that is named in the address, or the newest. */
  async load() {
    clearError(byId("library-error"));
    try {
      this.#stores = await this.#api.list(STORES);
    } catch (error) {
      if (error.status === 404) this.#showFixed();
      else showError(byId("library-error"), error, () => this.load());
      return;
    }
    const wanted = new URLSearchParams(location.search).get("collection");
    const store = this.#stores.find((s) => s.id === wanted) ?? this.#stores[0] ?? null;
    this.choose(store?.id ?? null);
    if (store === null) this.#toggleForm(true);
  }

  choose(id) {
    this.#chosen = this.#stores.find((store) => store.id === id) ?? null;
    history.replaceState(null, "", this.#chosen ? `?collection=${encodeURIComponent(id)}` : location.pathname);
    this.#drawOptions();
    byId("collection-details").hidden = this.#chosen === null;
    if (this.#chosen === null) return;
    this.files.choose(id);
    this.#draw();
    this.follow();
  }

  /** Looks at the chosen collection now, and again later. */
  async follow() {
    clearTimeout(this.#timer);
    const id = this.chosenId;
    if (id === null || document.hidden) return;
    let state;
    try {
      state = await this.#refresh(id);
      clearError(byId("library-error"));
    } catch (error) {
      if (error.status === 404) return this.load();
      showError(byId("library-error"), error, () => this.follow());
      state = "unreachable";
    }
    if (id !== this.chosenId) return;
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.follow(), POLL_MS[state]);
  }

  async #refresh(id) {
    const [store] = await Promise.all([this.#api.get(storePath(id)), this.files.refresh()]);
    if (id !== this.chosenId) return "idle";
    const before = this.#chosen.fusionrag.kv;
    this.#stores = this.#stores.map((other) => (other.id === id ? store : other));
    this.#chosen = store;
    this.#draw();
    if (this.files.isBusy) return "ingesting";
    const { num_chunks: numChunks, kv } = store.fusionrag;
    const isGrowing = kv.raw !== before.raw || kv.fused !== before.fused || kv.stale !== before.stale;
    return kv.raw < numChunks || isGrowing ? "computing" : "idle";
  }

  async #create(name) {
    if (!name) return;
    try {
      const store = await this.#api.post(STORES, { name });
      this.#stores = [store, ...this.#stores];
      this.#toggleForm(false);
      byId("collection-name").value = "";
      this.choose(store.id);
      byId("files").focus();
    } catch (error) {
      showError(byId("library-error"), error);
    }
  }

  #toggleForm(isOpen = byId("create").hidden) {
    byId("create").hidden = !isOpen;
    byId("new-collection").setAttribute("aria-expanded", isOpen);
    if (isOpen) byId("collection-name").focus();
  }

  #drawOptions() {
    const options = this.#stores.map((store) => el("option", { value: store.id }, nameOf(store)));
    if (options.length === 0) options.push(el("option", { value: "", disabled: true }, "No collection yet"));
    byId("collection").replaceChildren(...options);
    byId("collection").value = this.chosenId ?? "";
  }

  #draw() {
    const { usage_bytes: bytes, fusionrag: more } = this.#chosen;
    const size = [counted(more.num_documents, "document"), counted(more.num_chunks, "passage"), formatBytes(bytes)];
    byId("collection-size").textContent = size.join(" · ");
    byId("kv").hidden = more.num_chunks === 0;
    drawKV(more.num_chunks, more.kv);
  }

  #showFixed() {
    this.#isLive = false;
    byId("collection").replaceChildren(el("option", { value: "" }, "As the server is set"));
    byId("new-collection").hidden = true;
  }
}

/** How many of the passages have stored KV: on its own (raw), which is enough to reuse it, and behind related passages. */
function drawKV(numChunks, { raw, fused, stale, bytes }) {
  const [numFused, numRaw] = [Math.min(fused, numChunks), Math.min(raw, numChunks)];
  const parts = [
    { name: "fused", value: numFused, title: `${formatCount(numFused)} computed behind related passages` },
    { name: "raw", value: numRaw - numFused, title: `${formatCount(numRaw - numFused)} computed on their own` },
  ];
  const node = byId("kv-bar");
  node.replaceChildren(...bar(parts, numChunks, "").children);
  node.setAttribute("aria-valuemax", numChunks);
  node.setAttribute("aria-valuenow", numRaw);
  byId("kv-count").textContent = `${formatCount(numRaw)} of ${counted(numChunks, "passage")}`;
  const notes = [`${formatCount(numFused)} behind related passages`, formatBytes(bytes)];
  if (stale > 0) notes.splice(1, 0, `${formatCount(stale)} to refresh`);
  byId("kv-note").textContent = notes.join(" · ");
}
