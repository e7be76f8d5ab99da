// The features of a layer, and those of a layer with their best matches in another member.

const crumb = (at) => [`${at.member}, layer ${at.layer}`, tableLink(at)];

/** A note on a layer that its SAE does not explain. */
function warning(at, { fvu }) {
  const bound = study.max_fvu_global[at.sae];
  const above = ` of ${size(fvu)} at global tokens, above ${bound}, so its features say little about the encoder.`;
  return fvu > bound && h("p.note", `The SAE of ${at.member}, layer ${at.layer}, has an `, term("FVU"), above);
}

/** The columns that every table of features begins with. */
const nameColumn = (label, id, at, called) => ({
  id,
  label,
  text: true,
  heading: true,
  value: (row) => called(row)?.name?.toLowerCase() ?? null,
  cell: (row) => (at(row) ? anchor(featureLink(at(row)), named(called(row))) : "–"),
});
/** The same if names are in too many files to sort by them. */
const readNameColumn = (label, id, at) => ({
  id,
  label,
  cell: (row) => {
    if (!at(row)) return "–";
    const link = anchor(featureLink(at(row)), h("span.quiet", "…"));
    return lazily(link, async () => named(await loadFeature(at(row))));
  },
});
const plainColumn = (id, label, hint, values, write) => ({
  id,
  label,
  hint,
  value: (row) => values[row],
  cell: (row) => write(values[row]),
});
const imagesColumn = (id, at) => ({
  id,
  label: "Strongest samples",
  cell: (row) => (at(row) && current.query.get("images") !== "no" ? strip(at(row), 3) : null),
});
const numberColumn = (id, label, feature) => ({
  id,
  label,
  rising: true,
  value: feature,
  cell: (row) => (feature(row) < 0 ? "–" : String(feature(row))),
});

async function layerView(parts) {
  const at = place(parts);
  const member = memberNamed(at.member);
  const table = await loadTable(at);
  const others = othersOf(table);
  const rankings = Object.keys(table.delta);
  const here = (row) => ({ ...at, feature: row });
  const called = (row) => calledIn(table, row);
  const columns = [
    numberColumn("feature", "Feature", (row) => row),
    nameColumn("Name", "name", here, called),
    imagesColumn("images", here),
    plainColumn("strength", "S", MEANINGS.S, table.strength, size),
    plainColumn("density", "Density", MEANINGS.Density, table.density, percent),
    plainColumn("score", "Name z", MEANINGS["Name z"], table.score, fixed),
    plainColumn("auc", "Name AUC", MEANINGS["Name AUC"], table.auc, fixed),
    ...others.map((name) =>
      plainColumn(`rho:${name}`, `ρ ${name}`, `Best correlation in any ${explained()}layer of ${name}`, table.best[name].rho, rho),
    ),
    ...rankings.map((name) =>
      plainColumn(
        `delta:${name}`,
        `Δ ${name}`,
        `Comparative Sharedness in the ranking ${name}`,
        table.delta[name],
        size,
      ),
    ),
  ];
  const list = listing({
    caption: `Features of ${at.member}, layer ${at.layer}`,
    columns,
    count: table.strength.length,
    sorted: "-strength",
    unit: "feature",
    controls: [
      search("Name or number"),
      number("S from", "s"),
      checkbox("Named only", "named"),
      imagesBox(),
      moreFilters([
        number("S to", "s-to"),
        number("Density from, %", "from"),
        number("Density to, %", "to"),
        ...(others.length
          ? [
              number("ρ from", "rho"),
              number("ρ to", "rho-to"),
              control("ρ with", "with", {}, [["", "any member"], ...others.map((name) => [name, name])]),
            ]
          : []),
        ...(rankings.length
          ? [
              number("Δ from", "delta"),
              number("Δ to", "delta-to"),
              control("Δ in", "ranking", {}, [["", "any ranking"], ...rankings.map((name) => [name, name])]),
            ]
          : []),
      ]),
    ],
    keep: (query) => {
      const matches = searching(query);
      const limits = (...keys) => keys.map((key) => limit(query, key));
      const [strength, density] = [limits("s", "s-to"), limits("from", "to").map((share) => share && share / 100)];
      const [rhos, deltas] = [limits("rho", "rho-to"), limits("delta", "delta-to")];
      // An unknown choice means any, as the control shows.
      const chosen = (key, all) => (all.includes(query.get(key)) ? [query.get(key)] : all);
      const [members, ranked] = [chosen("with", others), chosen("ranking", rankings)];
      const none = ([low, high]) => low === null && high === null;
      return (row) =>
        matches(row, called(row)) &&
        between(table.strength[row], ...strength) &&
        between(table.density[row], ...density) &&
        (none(rhos) || members.some((name) => between(table.best[name].rho[row], ...rhos))) &&
        (none(deltas) || ranked.some((name) => between(table.delta[name][row], ...deltas))) &&
        (query.get("named") !== "yes" || table.name[row] !== null);
    },
  });
  return {
    title: `Features of ${at.member}, layer ${at.layer}`,
    at,
    crumbs: [crumb(at)],
    nodes: [
      layerLinks("Layer", member.layers, at.layer, (layer) => tableLink({ ...at, layer })),
      warning(at, table),
      h(
        "p.note",
        "S (strength) is a feature’s activation summed over the samples, and density the fraction of samples on which " +
          "it is above zero. Name z and Name AUC rate the name, not the feature. ρ is the best correlation with any " +
          `feature of a member, over all its ${explained()}layers; the best of many is above 0 even by chance.`,
      ),
      ...list.nodes,
    ],
    update: list.update,
  };
}

/** The best matches of a layer's features in one or any layer of another member, and the layers to choose from. */
async function bestMatches(a, b, pairs) {
  const table = await loadTable(a);
  const mine = { strength: table.strength, names: (row) => calledIn(table, row) };
  if (b.layer === ANY) {
    const best = found(table.best[b.member], `No analysis compares ${a.member} with ${b.member}.`);
    const at = (row) => (best.layer[row] < 0 ? null : { ...b, layer: best.layer[row], feature: best.feature[row] });
    return { ...mine, layers: pairs.length ? [ANY, ...memberNamed(b.member).layers] : [ANY], rho: best.rho, at };
  }
  if (!pairs.length) throw new NotFound(`No analysis compares ${a.member} with ${b.member} layer by layer.`);
  const [there, { layers: compared, rho: rhos, match }] = await Promise.all([
    loadTable(b),
    load(`${folder(a)}/pairs/${a.member}__${b.member}/${layerFile(a.layer)}`),
  ]);
  const target = compared.indexOf(b.layer);
  if (target < 0) throw new NotFound(`${a.member} was not compared with layer ${b.layer} of ${b.member}.`);
  const at = (row) => (match[target][row] < 0 ? null : { ...b, feature: match[target][row] });
  const theirs = (row) => (at(row) ? calledIn(there, at(row).feature) : null);
  return { ...mine, layers: [ANY, ...compared], theirs, rho: rhos[target], at };
}

async function pairView(parts) {
  const [dataset, sae, ...rest] = parts;
  const a = place([dataset, sae, rest[0], rest[1]]);
  const b =
    rest[3] === ANY
      ? { dataset, sae, member: memberNamed(rest[2]).name, layer: ANY }
      : place([dataset, sae, rest[2], rest[3]]);
  const any = b.layer === ANY;
  const pairs = study.layerwise
    .filter(inSet(a))
    .flatMap((entry) => entry.pairs)
    .filter((pair) => [pair.a, pair.b].includes(a.member) && [pair.a, pair.b].includes(b.member));
  const pair = pairs.find((entry) => entry.a === a.member && entry.b === b.member);
  const [wmppc, chance] = [pair?.wmppc, pair?.null].map(
    (cells) => cells?.[pair.layers_a.indexOf(a.layer)]?.[pair.layers_b.indexOf(b.layer)],
  );
  const { layers, strength, names, theirs, rho: values, at } = await bestMatches(a, b, pairs);
  const here = (row) => ({ ...a, feature: row });
  const there = any ? `${b.member}, any ${explained()}layer` : `${b.member} layer ${b.layer}`;
  const list = listing({
    caption: `Features of ${a.member} layer ${a.layer} with their best match in ${there}`,
    columns: [
      plainColumn("rho", "ρ", "Correlation with the best match", values, rho),
      numberColumn("feature", a.member, (row) => row),
      nameColumn("Name", "name", here, names),
      imagesColumn("images", here),
      plainColumn("strength", "S", MEANINGS.S, strength, size),
      ...(any ? [numberColumn("layer", "Layer", (row) => at(row)?.layer ?? -1)] : []),
      numberColumn("match", b.member, (row) => at(row)?.feature ?? -1),
      any
        ? readNameColumn("Name of the match", "match-name", at)
        : { ...nameColumn("Name of the match", "match-name", at, theirs), heading: false },
      imagesColumn("match-images", at),
    ],
    count: values.length,
    sorted: "-rho",
    unit: "feature",
    controls: [
      search("Name or number"),
      number("ρ from", "least"),
      number("ρ to", "most"),
      number("S from", "s"),
      checkbox(any ? "Named only" : "Both named", "named"),
      imagesBox(),
    ],
    keep: (query) => {
      const wanted = searching(query);
      const [least, most] = [limit(query, "least"), limit(query, "most")];
      return (row) =>
        (wanted(row, names(row)) || wanted(at(row)?.feature, theirs?.(row) ?? null)) &&
        between(values[row], least, most) &&
        between(strength[row], limit(query, "s"), null) &&
        (query.get("named") !== "yes" || (names(row).name !== null && (any || (theirs(row)?.name ?? null) !== null)));
    },
  });
  const last = memberNamed(b.member).layers.at(-1);
  const [source, target] = await Promise.all([a, ...(any ? [] : [b])].map(loadTable));
  return {
    title: `${a.member} layer ${a.layer} → ${there}`,
    at: a,
    crumbs: [crumb(a), [`to ${there}`, pairLink(a, a.member, a.layer, b.member, b.layer)]],
    nodes: [
      h(
        "p.lead",
        `Each feature of ${a.member}, layer ${a.layer}, and its best match in ${there}.`,
        (wmppc ?? null) !== null && ` wMPPC ${fixed(wmppc)}${byChance(chance)}.`,
      ),
      warning(a, source),
      !any && warning(b, target),
      layerLinks(`Layer of ${a.member}`, memberNamed(a.member).layers, a.layer, (layer) =>
        pairLink(a, a.member, layer, b.member, b.layer),
      ),
      layerLinks(`Layer of ${b.member}`, layers, b.layer, (layer) => pairLink(a, a.member, a.layer, b.member, layer)),
      h(
        "p",
        anchor(pairLink(a, b.member, any ? last : b.layer, a.member, any ? ANY : a.layer), "The other direction"),
        " · ",
        anchor(tableLink(a), `All features of ${a.member}, layer ${a.layer}`),
        any ? [] : [" · ", anchor(tableLink(b), `All features of ${b.member}, layer ${b.layer}`)],
      ),
      ...list.nodes,
    ],
    update: list.update,
  };
}
