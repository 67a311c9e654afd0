/** The two questions that this page asks: for a key, and whether to delete. Each resolves once the dialog is closed. */

import { byId } from "./dom.js";

// not a submit button: Enter in the field would press it, as the first of the form
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close("cancel"));

/** The key that was typed, or null. */
export async function askForKey(reason) {
  const field = byId("key");
  byId("key-reason").textContent = reason;
  field.value = "";
  const choice = await choiceOf(byId("key-dialog"));
  const key = field.value.trim();
  field.value = "";
  return choice === "use" && key ? key : null;
}

/** What to do with a file: "detach", "delete", or nothing (null), whichever way the dialog was left. */
export async function askToDelete(filename) {
  byId("delete-name").textContent = filename;
  const choice = await choiceOf(byId("delete-dialog"));
  return choice === "detach" || choice === "delete" ? choice : null;
}

function choiceOf(dialog) {
  return new Promise((resolve) => {
    dialog.returnValue = ""; // Esc may leave what was chosen the last time
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
    dialog.showModal();
  });
}
