// The overview: members, rankings, matrices and heatmaps by layer.

const ITSELF = "an encoder with itself";
const READINGS = {
  pooled: "all layers, pooled (Eq. 6)",
  layer_mean: "all layers, mean over layers",
  last: "last layer",
};

const VALUES = {
  wmppc: "wMPPC, as published",
  excess: "excess over chance",
};
const FORMULAS = { wmppc: "wMPPC", excess: "excess (wMPPC − null) / (1 − null)" };

function rankingItem(ranking) {
  const group = (members) => members.join(", ") || "none";
  const groups = `shared with ${group(ranking.shared_with)} more than with ${group(ranking.not_shared_with)}`;
  return h(
    "li",
    anchor(rankingLink(ranking), ranking.name),
    h("span.quiet", ` ${ranking.source}, layer ${ranking.layer}; ${groups}`),
  );
}

const space = (rows, columns) => ({
  minHeight: `${2.3 * rows + 4}rem`,
  minWidth: `min(100%, ${3.1 * columns + 2}rem)`,
});

function setSection(at, choices, update) {
  const [matrices, layerwise, rankings, fits] = ["matrices", "layerwise", "sharedness", "samples"].map((kind) =>
    study[kind].filter(inSet(at)),
  );
  const every = (column) =>
    [
      ...matrices.flatMap((matrix) => Object.values(matrix[column])),
      ...layerwise.flatMap(({ pairs }) => pairs.map((pair) => pair[column])),
    ]
      .flat(2)
      .filter((value) => value !== null);
  const all = every("wmppc");
  const scales = Object.fromEntries(
    Object.keys(VALUES).map((value) => [value, { low: 0, high: Math.max(0, ...every(value)) }]),
  );
  const nulls = every("null");
  const hatched = every("p").some((p) => p > ABOVE_CHANCE);
  const chosen = (query) => (Object.hasOwn(VALUES, query.get("value") ?? "") ? query.get("value") : "wmppc");
  const missing = [
    ...matrices
      .flatMap(({ wmppc }) => Object.values(wmppc))
      .flatMap((rows) => rows.flatMap((row, n) => row.filter((_, column) => column !== n))),
    ...layerwise.flatMap(({ pairs }) => pairs.map(({ wmppc }) => wmppc)).flat(2),
  ].includes(null);
  const empty = [...(matrices.length ? [ITSELF] : []), ...(missing ? ["no value"] : [])];

  const key = h("div");
  update.push((query) =>
    key.replaceChildren(
      legend(
        scales[chosen(query)],
        FORMULAS[chosen(query)],
        fixed,
        empty.length > 0 && h("span.empty", h("span.swatch", { "aria-hidden": "true" }), empty.join(" or ")),
      ),
    ),
  );

  const drawn = matrices.flatMap((matrix) => {
    const slot = h("div");
    update.push((query) => {
      const wanted = query.get("reading") ?? "";
      const reading = Object.hasOwn(matrix.wmppc, wanted) ? wanted : Object.keys(matrix.wmppc)[0];
      const value = chosen(query);
      const focused = slot.querySelector("a:focus");
      slot.replaceChildren(
        heatmap({
          caption:
            `From row to column, ${READINGS[reading] ?? reading}. Click a cell for the features of the row’s last ` +
            `layer, each with its best match in any ${explained()}layer of the column.`,
          corner: "from ↓ to →",
          rows: matrix.members.map((name) => [name, h("span.quiet", kindOf(memberNamed(name)))]),
          columns: matrix.members,
          values: matrix[value][reading],
          cells: {
            null: value === "wmppc" && matrix.null[reading],
            p: matrix.p[reading],
            unexplained: matrix.unexplained[reading],
            left_out: matrix.left_out[reading],
          },
          scale: scales[value],
          cellLink: (row, column) =>
            pairLink(
              at,
              matrix.members[row],
              memberNamed(matrix.members[row]).layers.at(-1),
              matrix.members[column],
              ANY,
            ),
          cellLabel: (row, column) => `${FORMULAS[value]} from ${matrix.members[row]} to ${matrix.members[column]}`,
          emptyLabel: (row, column) => (row === column ? ITSELF : "no value"),
        }),
      );
      if (focused) slot.querySelector("a")?.focus();
    });
    return [h("h4", matrix.name), slot];
  });

  return h(
    "section.set",
    h("h2", `${at.dataset}, SAE setting ${at.sae}`),
    h("p", anchor(searchLink(at), "Search"), " for features by words in captions."),
    h("h3", "Features by layer"),
    h(
      "ul.members",
      study.members.map((member) =>
        h(
          "li",
          h("span.name", member.name),
          h("span.quiet", `${describe(member)},`, h("br"), `${plural(member.features[at.sae], "feature")} per layer`),
          layerLinks(`Layers of ${member.name}`, member.layers, null, (layer) =>
            tableLink({ ...at, member: member.name, layer }),
          ),
        ),
      ),
    ),
    rankings.length > 0 && h("h3", "Rankings by Comparative Sharedness"),
    rankings.length > 0 && h("ul.rankings", rankings.map(rankingItem)),
    fits.length > 0 && h("h3", "Fit of images and captions"),
    fits.length > 0 && h("ul.rankings", fits.map(fitItem)),
    all.length > 0 && [
      h("h3", "Shared features (wMPPC)"),
      h(
        "p",
        term("wMPPC"),
        " is the mean of each feature’s best correlation with a feature of the other member, weighted by strength S. ",
        nulls.length > 0 &&
          "It is above 0 even by chance, and the more so the more features the target has: with samples re-paired at " +
            `random (the null), it is ${fixed(Math.min(...nulls))} to ${fixed(Math.max(...nulls))} here. The excess over ` +
            "chance is (wMPPC − null) / (1 − null). ",
        hatched && "Hatched cells are not above their null. ",
        every("unexplained").some(Boolean) && ["A marked upper corner: with ", ...unexplained(at), ". "],
        matrices.some(({ left_out }) => Object.values(left_out).flat(2).some(Boolean)) && [
          "A marked lower corner: without ",
          ...unexplained(at),
          ". ",
        ],
        layerwise.length > 0 && "In heatmaps by layer, the first layer is at the bottom left. ",
        "Arrow keys move between the cells of a table.",
      ),
      ...choices.map(nodeOf),
      key,
    ],
    drawn,
    layerwise.flatMap((analysis) => [
      h("h4", `${analysis.name}, layer by layer`),
      h(
        "div.heats",
        analysis.pairs.map((pair) => layerHeatmap(at, pair, scales, chosen, update)),
      ),
    ]),
  );
}

/** The heatmap of a pair of members, layer by layer. */
function layerHeatmap(at, { a, b, layers_a, layers_b, ...cells }, scales, chosen, update) {
  const slot = h("div", { style: space(layers_a.length, layers_b.length) });
  let value = null;
  const draw = () =>
    heatmap({
      caption: `From ${a} ↑ to ${b} →`,
      corner: "layer",
      rows: layers_a.map(String),
      columns: layers_b.map(String),
      values: cells[value],
      cells: { ...cells, null: value === "wmppc" && cells.null },
      scale: scales[value],
      cellLink: (row, column) => pairLink(at, a, layers_a[row], b, layers_b[column]),
      cellLabel: (row, column) =>
        `${FORMULAS[value]} from ${a} layer ${layers_a[row]} to ${b} layer ${layers_b[column]}`,
      emptyLabel: () => "no value",
      upward: true,
    });
  update.push((query) => {
    if (value === chosen(query)) return;
    value = chosen(query);
    // There may be thousands of cells; each table's place has its final size.
    if (slot.hasChildNodes()) slot.replaceChildren(draw());
    else lazily(slot, draw);
  });
  return slot;
}

/** How to read the pages, in a few sentences. */
const guide = () =>
  h(
    "details.guide",
    h("summary", "How to read these pages"),
    h(
      "ul",
      h("li", "A member is an encoder with the seed of its sparse autoencoders (SAEs); a feature is a latent of one of them."),
      h("li", "A layer lists its features. A feature’s page shows its strongest samples, and its best match in each other member."),
      h("li", term("S"), " says how active a feature is, ", term("ρ"), " how well its best match agrees, and ", term("wMPPC"), " is the mean of ρ over features, weighted by S."),
      h("li", "Compare cells by their ", term("excess"), ": it subtracts the ", term("null"), ", which is larger for wider targets."),
      h("li", "A ranking lists features shared with one group of members more than with another, by ", term("Δ"), "."),
      h("li", "A click on an image shows the features that fire for this sample; Search finds samples by words."),
      h("li", "Mark features, with notes, to list and export them: see Marked, above."),
      h("li", "Names come from words in captions. One in grey, such as “perhaps red”, does not predict the feature on other samples."),
    ),
  );

function overview() {
  const update = [];
  const readings = [...new Set(study.matrices.flatMap((matrix) => Object.keys(matrix.wmppc)))];
  const sections = study.datasets.flatMap(({ name }) =>
    study.saes.map((sae) => {
      const choices = [
        control("Value", "value", {}, Object.entries(VALUES)),
        ...(readings.length
          ? [
              control(
                "Reading (how layers are combined)",
                "reading",
                {},
                readings.map((reading) => [reading, READINGS[reading] ?? reading]),
              ),
            ]
          : []),
      ];
      choices.forEach((choice) => update.push(choice.sync));
      return setSection({ dataset: name, sae }, choices, update);
    }),
  );
  const sets = study.datasets.map(({ name, samples }) => `${name} (${plural(samples, "sample")})`).join(", ");
  const different = new Set(study.members.map(({ encoder }) => encoder)).size;
  const seeds = different < study.members.length ? ` (${study.members.length} counting seeds)` : "";
  const encoders = `${plural(different, "encoder")}${seeds}`;
  return {
    title: "Overview",
    heading: study.study,
    crumbs: [],
    nodes: [
      h("p.lead", `SAE features of ${encoders}, on ${sets}.`),
      guide(),
      (study.codes.length > 1 || study.codes[0] !== "before_topk") &&
        h(
          "p",
          `These pages show features ${CODES[study.codes[0]]}`,
          study.codes.slice(1).map((code) => `; those ${CODES[code]} are in the study’s tables and figures`),
          ".",
        ),
      h("p.quiet", `conceptshare ${study.version}`),
      ...sections,
    ],
    update: (query) => update.forEach((part) => part(query)),
  };
}
