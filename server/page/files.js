/**
 * The files of the chosen collection: uploading, their way to being ready, deleting.
 *
 * Rows are kept and updated, never rebuilt, so that focus stays where it was while the list is polled.
 */

import { explain } from "./api.js";
import { askToDelete } from "./dialogs.js";
import { byId, el } from "./dom.js";
import { showError } from "./notices.js";

const PAGE = 50; // rows shown at first, and more each time
const STATES = { in_progress: "Waiting", completed: "Ready", failed: "Failed", cancelled: "Cancelled" };

export class FileList {
  #api;
  #onChange;
  #collectionId = null;
  #rows = new Map(); // key → Row, newest first
  #uploads = new Map(); // key → {name, fraction, error, controller}
  #numUploads = 0;
  #names = new Map(); // file id → what the client called it
  #files = [];
  #numShown = PAGE;
  #queue = Promise.resolve(); // uploads, one at a time

  /** onChange: called after a file was attached or deleted. */
  constructor(api, onChange) {
    this.#api = api;
    this.#onChange = onChange;
    byId("more-files").addEventListener("click", () => {
      this.#numShown += PAGE;
      this.#draw();
    });
  }

  get isBusy() {
    return this.#files.some((file) => file.status === "in_progress");
  }

  /** Another collection is shown from now on; uploads into the former one go on unseen. */
  choose(collectionId) {
    this.#collectionId = collectionId;
    this.#files = [];
    this.#numShown = PAGE;
    for (const row of this.#rows.values()) row.node.remove();
    this.#rows.clear();
  }

  async refresh() {
    const id = this.#collectionId;
    const files = await this.#api.list(`v1/vector_stores/${encodeURIComponent(id)}/files`);
    if (files.some((file) => !this.#names.has(file.id))) {
      for (const file of await this.#api.list("v1/files", 10000)) this.#names.set(file.id, file.filename);
    }
    if (id !== this.#collectionId) return;
    this.#announce(files);
    this.#files = files;
    this.#draw();
  }

  /** Uploads files and attaches them to the collection that is chosen now. */
  add(files) {
    for (const file of files) {
      const upload = {
        key: `upload-${++this.#numUploads}`,
        collectionId: this.#collectionId,
        name: file.name,
        fraction: 0,
        error: null,
        controller: new AbortController(),
      };
      this.#uploads.set(upload.key, upload);
      this.#queue = this.#queue.then(() => this.#upload(upload, file));
    }
    this.#draw();
  }

  async #upload(upload, file) {
    const report = (fraction) => {
      upload.fraction = fraction;
      this.#draw();
    };
    try {
      upload.controller.signal.throwIfAborted();
      const { id } = await this.#api.upload(file, report, upload.controller.signal);
      this.#names.set(id, file.name);
      const path = `v1/vector_stores/${encodeURIComponent(upload.collectionId)}/files`;
      await this.#attach(path, id);
      this.#uploads.delete(upload.key);
      this.#onChange();
    } catch (error) {
      if (error.name === "AbortError") this.#uploads.delete(upload.key);
      else upload.error = error;
    }
    this.#draw();
  }

  /** A file that cannot be attached would lie there unseen. */
  async #attach(path, id) {
    try {
      await this.#api.post(path, { file_id: id });
    } catch (error) {
      await this.#api.delete(`v1/files/${id}`).catch(() => {});
      throw error;
    }
  }

  async #remove(file) {
    const choice = await askToDelete(this.#names.get(file.id) ?? file.id);
    if (choice === null) return;
    const attached = `v1/vector_stores/${encodeURIComponent(this.#collectionId)}/files/${file.id}`;
    try {
      await this.#api.delete(choice === "detach" ? attached : `v1/files/${file.id}`);
      this.#files = this.#files.filter((other) => other.id !== file.id);
      this.#say(`${this.#names.get(file.id) ?? file.id} is deleted.`);
    } catch (error) {
      showError(byId("library-error"), error);
    }
    this.#draw();
    byId("files").focus();
    this.#onChange();
  }

  #dismiss(upload) {
    upload.controller.abort();
    if (upload.error !== null) this.#uploads.delete(upload.key);
    this.#draw();
    byId("files").focus();
  }

  #announce(files) {
    const before = new Map(this.#files.map((file) => [file.id, file.status]));
    for (const { id, status } of files) {
      if (before.get(id) !== "in_progress" || status === "in_progress") continue;
      this.#say(`${this.#names.get(id) ?? id}: ${STATES[status]}.`);
    }
  }

  #say(words) {
    byId("file-news").textContent = words;
  }

  #draw() {
    const uploads = [...this.#uploads.values()].filter((u) => u.collectionId === this.#collectionId).reverse();
    const files = this.#files.slice(0, this.#numShown);
    const wanted = [
      ...uploads.map((u) => [u.key, uploadView(u), () => this.#dismiss(u)]),
      ...files.map((f) => [f.id, fileView(f, this.#names.get(f.id) ?? f.id), () => this.#remove(f)]),
    ];
    const keys = new Set(wanted.map(([key]) => key));
    for (const [key, row] of this.#rows) {
      if (keys.has(key)) continue;
      row.node.remove();
      this.#rows.delete(key);
    }
    const list = byId("file-list");
    wanted.forEach(([key, view, onRemove], place) => {
      if (!this.#rows.has(key)) this.#rows.set(key, new Row());
      const row = this.#rows.get(key);
      row.show(view, onRemove);
      if (list.children[place] !== row.node) list.insertBefore(row.node, list.children[place] ?? null);
    });
    byId("more-files").hidden = this.#files.length <= this.#numShown;
  }
}

function uploadView({ name, fraction, error }) {
  if (error !== null) {
    const { detail, remedy } = explain(error);
    const problem = `${detail.replace(/\.$/, "")}. ${remedy}`;
    return { name, state: "failed", words: STATES.failed, fraction: null, problem, remove: "Dismiss" };
  }
  return { name, state: "in_progress", words: "Uploading", fraction, problem: "", remove: "Cancel the upload of" };
}

function fileView(file, name) {
  const { stage = null, progress = null } = file.fusionrag ?? {};
  const words = (file.status === "in_progress" && stage) || STATES[file.status];
  const problem = file.last_error?.message ?? "";
  const fraction = file.status === "in_progress" ? (progress ?? 0) : null;
  return { name, state: file.status, words, fraction, problem, remove: "Delete" };
}

class Row {
  #name = el("span", { class: "name" });
  #words = el("span", { class: "state" });
  #problem = el("p", { class: "problem" });
  #progress = el("progress", { max: 1 });
  #button = el("button", { type: "button", class: "plain icon" }, "×");
  #onRemove = null;
  node = el(
    "li",
    { class: "file" },
    el("div", { class: "row spread" }, this.#name, this.#words, this.#button),
    this.#progress,
    this.#problem,
  );

  constructor() {
    this.#button.addEventListener("click", () => this.#onRemove());
  }

  show({ name, state, words, fraction, problem, remove }, onRemove) {
    this.#onRemove = onRemove;
    this.node.dataset.state = state;
    this.#name.textContent = name;
    this.#name.title = name;
    this.#words.textContent = words.charAt(0).toUpperCase() + words.slice(1);
    this.#problem.textContent = problem;
    this.#problem.hidden = !problem;
    this.#progress.hidden = fraction === null;
    this.#progress.value = fraction ?? 0;
    this.#progress.setAttribute("aria-label", `${words}: ${name}`);
    this.#button.setAttribute("aria-label", `${remove} ${name}`);
  }
}
