/** The page: its parts put together, and what the keyboard and the form do. */

import { Api } from "./api.js";
import { Conversation } from "./answer.js";
import { Collections } from "./collections.js";
import { askForKey } from "./dialogs.js";
import { byId } from "./dom.js";
import { showError } from "./notices.js";

const api = new Api(askForKey);
const collections = new Collections(api);
let model = null; // until the server was reached
const conversation = new Conversation(
  api,
  () => model,
  () => collections.chosenId,
  () => collections.load(),
);

let started = start(); // what is asked or dropped before waits for it

async function start() {
  const place = byId("library-error");
  try {
    const { data } = await api.get("v1/models");
    model = (data.find((card) => card.max_model_len) ?? data[0]).id;
    byId("model").textContent = model;
  } catch (error) {
    showError(place, error, () => (started = start()));
    return;
  }
  byId("change-key").hidden = !api.hasKey;
  await collections.load();
  const isUntouched = document.activeElement === document.body && matchMedia("(hover: hover)").matches;
  if (collections.canAsk && isUntouched) byId("question").focus();
}

// --- asking ------------------------------------------------------------------------------------------------------------

let ratio = null; // null: the server's own

function showRatio() {
  byId("ratio-value").textContent = ratio === null ? "default" : `${Math.round(ratio * 100)} %`;
  byId("ratio-field").classList.toggle("default", ratio === null);
  byId("ratio-reset").hidden = ratio === null;
}

byId("ratio").addEventListener("input", (event) => {
  ratio = Number(event.target.value);
  showRatio();
});
byId("ratio-reset").addEventListener("click", () => {
  ratio = null;
  showRatio();
  byId("ratio").focus();
});
byId("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  await started;
  if (!collections.canAsk) byId("new-collection").focus();
  else conversation.ask(byId("question").value.trim(), ratio);
});
byId("question").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  byId("ask").requestSubmit();
});
byId("cancel").addEventListener("click", () => conversation.cancel());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && document.querySelector("dialog[open]") === null) conversation.cancel();
});

// --- files -------------------------------------------------------------------------------------------------------------

async function addFiles(files) {
  await started;
  if (collections.chosenId === null) byId("new-collection").focus();
  else collections.files.add(files);
}

byId("files").addEventListener("change", (event) => {
  addFiles([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});
// the whole page takes drops: one that misses would make the browser leave the page
for (const [type, isOver] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  document.addEventListener(type, (event) => {
    event.preventDefault();
    byId("drop").classList.toggle("over", isOver && event.dataTransfer.types.includes("Files"));
  });
}
document.addEventListener("drop", (event) => addFiles([...event.dataTransfer.files]));

byId("change-key").addEventListener("click", async () => {
  if (await api.changeKey("Give the key that this page shall use from now on.")) started = start();
});

showRatio();
