"use strict";
// Lines of a chart go off and on by their names in the legend.
for (const button of document.querySelectorAll(".legend button")) {
  button.addEventListener("click", () => {
    const on = button.getAttribute("aria-pressed") !== "true";
    button.setAttribute("aria-pressed", String(on));
    for (const part of document.querySelectorAll(`.series[data-series="${button.dataset.series}"]`)) {
      part.classList.toggle("off", !on);
    }
  });
}
// Points say what they are at once, below the pointer or where the focus is.
const tip = document.createElement("div");
tip.className = "tip";
tip.setAttribute("role", "status");
tip.hidden = true;
document.body.append(tip);
for (const point of document.querySelectorAll("[data-tip]")) {
  point.querySelector("title")?.remove(); // the browser's own would come late, on top
  const show = () => {
    tip.textContent = point.dataset.tip;
    tip.hidden = false;
    const box = point.getBoundingClientRect();
    const left = Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(left, 8) + window.scrollX}px`;
    tip.style.top = `${box.bottom + window.scrollY + 6}px`;
  };
  const hide = () => { tip.hidden = true; };
  point.addEventListener("pointerenter", show);
  point.addEventListener("focus", show);
  point.addEventListener("pointerleave", hide);
  point.addEventListener("blur", hide);
}
// Tables are sorted by a column: numbers by value, what was not measured last.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value;
      const number = (row) => (key(row) === undefined || key(row) === "" ? NaN : Number(key(row)));
      const rows = [...table.tBodies[0].rows];
      const numeric = rows.some((row) => !Number.isNaN(number(row)));
      rows.sort((a, b) => {
        if (!numeric) {
          const order = a.cells[column].textContent.localeCompare(b.cells[column].textContent, undefined, { numeric: true });
          return down ? -order : order;
        }
        const [x, y] = [number(a), number(b)];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return down ? y - x : x - y;
      });
      table.tBodies[0].append(...rows);
    });
  });
}
