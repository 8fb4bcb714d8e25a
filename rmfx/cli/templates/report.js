"use strict";
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

// A box that is tapped, clicked or focused is described at the foot of the window.
const panel = document.querySelector("#detail");
const describe = box => {
  for (const other of all(".node.chosen")) other.classList.remove("chosen");
  panel.hidden = !box;
  if (!box) return;
  box.classList.add("chosen");
  panel.querySelector("output").textContent = box.querySelector("title").textContent;
};
document.addEventListener("click", event => {
  if (!event.target.closest("#detail output")) describe(event.target.closest(".node"));
});
document.addEventListener("focusin", event => {
  const box = event.target.closest(".node");
  if (box) describe(box);
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") describe(null);
  const step = { ArrowDown: 1, ArrowRight: 1, ArrowUp: -1, ArrowLeft: -1 }[event.key];
  const box = event.target.closest(".node");
  if (!step || !box) return;
  event.preventDefault();
  const boxes = all(".node", box.parentNode), next = boxes[boxes.indexOf(box) + step];
  if (!next) return;
  box.setAttribute("tabindex", -1);  // Tab leads to one box of a graph, the last one visited
  next.setAttribute("tabindex", 0);
  next.focus();
});

// What scrolls says so.
const hint = () => {
  for (const box of all(".scroll")) {
    const fits = box.scrollWidth <= box.clientWidth && box.scrollHeight <= box.clientHeight;
    box.previousElementSibling.hidden = fits;
  }
};
hint();
addEventListener("resize", hint);
document.addEventListener("toggle", hint, true);  // of a stage

// The table sorts and filters.
const body = document.querySelector("#sites tbody");
if (body) {
  const rows = [...body.rows], words = document.querySelector("#words"), status = document.querySelector("#status");
  for (const head of all("#sites th")) head.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    const value = row => row.cells[head.cellIndex].dataset.value;
    const compare = (a, b) => a === "" || b === "" || isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...rows.sort((a, b) => (up ? 1 : -1) * compare(value(a), value(b))));
  });
  const filter = () => {
    const wanted = words.value.toLowerCase().split(/\s+/);
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !wanted.every(word => text.includes(word)) || ![undefined, "", row.dataset.status].includes(status?.value);
    }
    document.querySelector("#count").textContent = `${rows.filter(row => !row.hidden).length} of ${rows.length} sites`;
  };
  words.addEventListener("input", filter);
  status?.addEventListener("change", filter);
}
