// The overview: members, rankings, matrices and heatmaps by layer.

const READINGS = {
  pooled: "all layers, pooled (Eq. 6)",
  layer_mean: "all layers, mean over layers",
  last: "last layers alone",
};

function rankingItem(ranking) {
  const group = (members) => members.join(", ") || "none";
  const groups = `shared with ${group(ranking.shared_with)} more than with ${group(ranking.not_shared_with)}`;
  return h(
    "li",
    {},
    h("a", { href: rankingLink(ranking) }, ranking.name),
    h("span", { class: "quiet" }, ` ${ranking.source}, layer ${ranking.layer}; ${groups}`),
  );
}

const space = (rows, columns) => ({
  minHeight: `${2.3 * rows + 4}rem`,
  minWidth: `min(100%, ${3.1 * columns + 2}rem)`,
});

function setSection(at, choice, update) {
  const here = (entry) => entry.dataset === at.dataset && entry.sae === at.sae;
  const matrices = study.matrices.filter(here);
  const layerwise = study.layerwise.filter(here);
  const rankings = study.sharedness.filter(here);
  const every = (ofMatrix, ofPair) =>
    [
      ...matrices.flatMap((matrix) => Object.values(matrix[ofMatrix])),
      ...layerwise.flatMap(({ pairs }) => pairs.map((pair) => pair[ofPair])),
    ]
      .flat(2)
      .filter((value) => value !== null);
  const all = every("readings", "wmppc");
  const scale = { low: Math.min(...all), high: Math.max(...all) };
  const floors = every("floors", "floor");

  const drawn = matrices.map((matrix) => {
    const slot = h("div");
    update.push((query) => {
      const wanted = query.get("reading") ?? "";
      const reading = Object.hasOwn(matrix.readings, wanted) ? wanted : Object.keys(matrix.readings)[0];
      const focused = slot.querySelector("a:focus");
      slot.replaceChildren(
        heatmap(
          `From row to column, ${READINGS[reading] ?? reading}. A cell leads to the features of its row’s last layer, ` +
            "each with its best match in any layer.",
          "from ↓ to →",
          matrix.members,
          matrix.members,
          matrix.readings[reading],
          matrix.floors[reading],
          scale,
          (row, column) => pairLink(
            at,
            matrix.members[row],
            memberNamed(matrix.members[row]).layers.at(-1),
            matrix.members[column],
            ANY,
          ),
          (row, column) => `wMPPC from ${matrix.members[row]} to ${matrix.members[column]}`,
        ),
      );
      if (focused) slot.querySelector("a")?.focus();
    });
    return [h("h4", {}, matrix.name), slot];
  });

  return h(
    "section",
    { class: "set" },
    h("h2", {}, `${at.dataset}, SAE setting ${at.sae}`),
    h("h3", {}, "Features by layer"),
    h(
      "ul",
      { class: "members" },
      study.members.map((member) =>
        h(
          "li",
          {},
          h("span", { class: "name" }, member.name),
          h(
            "span",
            { class: "quiet" },
            `${member.modality}, ${member.kind}, ${plural(member.features[at.sae], "feature")} a layer`,
          ),
          layerLinks(
            `Layers of ${member.name}`,
            member.layers,
            null,
            (layer) => tableLink({ ...at, member: member.name, layer }),
          ),
        ),
      ),
    ),
    rankings.length ? [
      h("h3", {}, "Rankings by Comparative Sharedness"),
      h("ul", { class: "rankings" }, rankings.map(rankingItem)),
    ] : [],
    all.length ? [
      h("h3", {}, "Shared features (wMPPC)"),
      h(
        "p",
        {},
        "wMPPC: the mean of each feature’s best correlation, weighted by S. ",
        floors.length
          ? "It is never 0, as the best of many matches is not: by chance, with shuffled samples, it is " +
              `${fixed(Math.min(...floors))} to ${fixed(Math.max(...floors))} here. `
          : "",
        "Arrow keys move between the cells of a table.",
      ),
      legend(
        scale,
        "wMPPC",
        fixed,
        h("span", { class: "swatch", "aria-hidden": "true" }),
        h("span", {}, "no value"),
      ),
    ] : [],
    matrices.length && choice.node,
    drawn.flat(),
    layerwise.map((analysis) => [
      h("h4", {}, `${analysis.name}, layer by layer`),
      h(
        "div",
        { class: "heats" },
        analysis.pairs.map(({ a, b, layers_a, layers_b, wmppc, floor }) =>
          // There may be thousands of cells; the place of a table is as large as it will be.
          lazily(h("div", { style: space(layers_a.length, layers_b.length) }), () =>
            heatmap(
              `From ${a} ↓ to ${b} →`,
              "",
              layers_a.map(String),
              layers_b.map(String),
              wmppc,
              floor,
              scale,
              (row, column) => pairLink(at, a, layers_a[row], b, layers_b[column]),
              (row, column) => `wMPPC from ${a} layer ${layers_a[row]} to ${b} layer ${layers_b[column]}`,
            ),
          ),
        ),
      ),
    ]).flat(),
  );
}

function overview() {
  const update = [];
  const readings = [...new Set(study.matrices.flatMap((matrix) => Object.keys(matrix.readings)))];
  const sections = study.datasets.flatMap(({ name }) =>
    study.saes.map((sae) => {
      const choice = control(
        "Reading of the matrices",
        "reading",
        {},
        readings.map((reading) => [reading, READINGS[reading] ?? reading]),
      );
      update.push(choice.sync);
      return setSection({ dataset: name, sae }, choice, update);
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
      h("p", { class: "lead" }, `SAE features of ${encoders}, on ${sets}.`),
      h("p", { class: "quiet" }, `conceptshare ${study.version}`),
      ...sections,
    ],
    update: (query) => update.forEach((part) => part(query)),
  };
}
