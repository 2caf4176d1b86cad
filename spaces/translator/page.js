// What the page does by itself: keys, counter, swap, copy. No library, nothing fetched.
window.pages = {
  swap(source, target, from, to) {
    const known = from !== "auto";
    return [target || source, target ? source : "", to, known ? from : to === "en" ? "ja" : "en"];
  },
  count(text) {
    const shown = document.getElementById("count");
    if (!shown) return;
    const limit = Number(shown.dataset.limit);
    const count = [...(text || "")].length;
    shown.textContent = `${count.toLocaleString()} / ${limit.toLocaleString()}`;
    shown.classList.toggle("over", limit > 0 && count > limit);
  },
  async copy(text, id) {
    const button = document.getElementById(id);
    try {
      await navigator.clipboard.writeText(text || "");
    } catch {
      // no clipboard without https or permission: select a copy the old way
      const area = document.createElement("textarea");
      area.value = text || "";
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button?.classList.add("copied");
    setTimeout(() => button?.classList.remove("copied"), 1500);
  },
};

document.addEventListener("keydown", (event) => {
  const press = (id) => {
    const button = document.getElementById(id);
    if (!button || button.disabled) return;
    event.preventDefault();
    button.click();
  };
  if (event.isComposing) return; // an input method's own Enter and Escape
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) press("go");
  if (event.key === "Escape") press("stop");
});

document.addEventListener("input", (event) => {
  if (event.target.closest?.("#source")) pages.count(event.target.value);
});

new MutationObserver(() => {
  for (const area of document.querySelectorAll("#source textarea, #target textarea"))
    if (area.dir !== "auto") area.dir = "auto";
  const name = document.querySelector("[data-swap]")?.dataset.swap;
  const swap = document.getElementById("swap");
  if (name && swap && swap.title !== name) {
    swap.title = name;
    swap.setAttribute("aria-label", name);
  }
}).observe(document, { childList: true, subtree: true });
