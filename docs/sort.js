// A click on a table's heading sorts by that column; a second click turns the order round.
const text = (row, column) => row.cells[column].textContent.trim();
const number = (text) => Number.parseFloat(text.replace(/,(?=\d{3})/g, "")); // "1,000 = .87" is 1000

for (const head of document.querySelectorAll(".md-typeset table thead th")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0];
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
    const compare = (a, b) => {
      const [x, y] = [a, b].map((row) => text(row, head.cellIndex));
      return down * (number(x) - number(y) || x.localeCompare(y));
    };
    body.append(...[...body.rows].sort(compare));
  });
}
