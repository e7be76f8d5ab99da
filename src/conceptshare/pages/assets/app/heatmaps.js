// Heatmaps and their colours.

const VIRIDIS = "440154481a6c472f7d41448739568c31688e2a788e23888e1f988b22a88435b77954c5687ad151a5db36d2e21bfde725"
  .match(/.{6}/g)
  .map((colour) => [0, 2, 4].map((at) => parseInt(colour.slice(at, at + 2), 16)));

/** The colour of a share of the scale, and black or white, whichever has more contrast with it. */
function viridis(share) {
  const place = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const low = Math.min(Math.floor(place), VIRIDIS.length - 2);
  const colour = VIRIDIS[low].map((value, at) => Math.round(value + (place - low) * (VIRIDIS[low + 1][at] - value)));
  const [red, green, blue] = colour.map((value) =>
    value <= 10 ? value / 3294.6 : ((value / 255 + 0.055) / 1.055) ** 2.4,
  );
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  return { colour, background: `rgb(${colour})`, ink: luminance > 0.179 ? "#000" : "#fff" };
}

const byChance = (by) => ((by ?? null) === null ? "" : `, by chance ${fixed(by)}`);
const ABOVE_CHANCE = 0.05;
let heatmaps = 0;

/**
 * A heatmap: a table of links, between which arrow keys move, so that it is one stop of the Tab key.
 *
 * Its first row is at the top, or at the bottom if it goes `upward`. Cells that are not above chance are hatched. Those
 * with unexplained layers have a marked upper corner, and those that leave such layers out a marked lower corner.
 */
function heatmap({ caption, corner, rows, columns, values, cells, scale, cellLink, cellLabel, emptyLabel, upward }) {
  const id = `heatmap-${heatmaps++}`;
  const long = Math.max(...columns.map((name) => name.length)) > 4;
  const upright = long && columns.length > 6;
  const table = h(
    "table",
    {
      class: `heat${long ? " long" : ""}${upright ? " upright" : ""}${upward ? " upward" : ""}`,
      "aria-labelledby": id,
    },
    h(
      "thead",
      h(
        "tr",
        h("td.corner", corner),
        columns.map((name) => h("th", { scope: "col" }, h("span", name))),
      ),
    ),
    h(
      "tbody",
      (upward ? [...rows.keys()].reverse() : [...rows.keys()]).map((row) =>
        h(
          "tr",
          h("th", { scope: "row" }, rows[row]),
          columns.map((_, column) => {
            const value = values[row]?.[column] ?? null;
            if (value === null) {
              const empty = emptyLabel(row, column);
              return h("td.null", { title: empty }, h("span.hidden", empty));
            }
            const { background, ink } = viridis((value - scale.low) / (scale.high - scale.low || 1));
            const [chance, p, marked, leftOut] = ["null", "p", "unexplained", "left_out"].map(
              (name) => cells[name]?.[row]?.[column],
            );
            const hatched = p > ABOVE_CHANCE;
            const label =
              `${cellLabel(row, column)}: ${fixed(value)}${byChance(chance)}${hatched ? ", not above chance" : ""}` +
              (marked ? `, ${plural(marked, "layer")} not explained by SAEs` : "") +
              (leftOut ? `, without ${plural(leftOut, "layer")} not explained by SAEs` : "");
            return h(
              "td",
              h(
                "a",
                {
                  href: cellLink(row, column),
                  "aria-label": label,
                  title: label,
                  tabindex: "-1",
                  class: [hatched && "hatched", marked && "unexplained", leftOut && "left-out"].filter(Boolean).join(" "),
                  style: { backgroundColor: background, color: ink },
                },
                fixed(value),
              ),
            );
          }),
        ),
      ),
    ),
  );
  const stop = (cell) => {
    table.querySelector('a[tabindex="0"]')?.setAttribute("tabindex", "-1");
    cell?.setAttribute("tabindex", "0");
  };
  stop(table.querySelector("a"));
  table.addEventListener("focusin", (event) => stop(event.target));
  table.addEventListener("keydown", (event) => {
    const cell = event.target.closest("td");
    if (!cell || event.ctrlKey || event.altKey || event.metaKey) return;
    // Sideways also from row to row, so that every cell can be reached even if some have no value.
    const links = [...table.querySelectorAll("a")];
    const column = links.filter((link) => link.parentNode.cellIndex === cell.cellIndex);
    const moves = { ArrowLeft: [links, -1], ArrowRight: [links, 1], ArrowUp: [column, -1], ArrowDown: [column, 1] };
    if (!Object.hasOwn(moves, event.key)) return;
    event.preventDefault();
    const [line, step] = moves[event.key];
    line[line.indexOf(event.target) + step]?.focus();
  });
  return h("figure.heatmap", h("figcaption", { id }, caption), h("div.scroll", table));
}

function legend({ low, high }, what, write, ...more) {
  const stops = VIRIDIS.map((colour) => `rgb(${colour})`).join(",");
  return h(
    "p.legend",
    h("span", write(low)),
    h("span.ramp", {
      role: "img",
      "aria-label": `Colour scale of ${what}, from dark violet at ${write(low)} to yellow at ${write(high)}`,
      style: { background: `linear-gradient(90deg, ${stops})` },
    }),
    h("span", write(high)),
    more,
  );
}
