// A ranking by Comparative Sharedness, as published or calibrated.

const RANKINGS = { published: "ρ, as published", calibrated: "excess of ρ over chance" };

function scatter(ranking, at, called, symbol) {
  const side = 320;
  const x = (value) => Math.min(Math.max(value, 0), 1) * side;
  const points = ranking.features.map((_, row) => [ranking.rho_h[row], ranking.rho_g[row]]);
  const dots = (from, to) =>
    points
      .slice(from, to)
      .filter(([h, g]) => h !== null && g !== null)
      .map(([h, g]) => `M${x(h).toFixed(1)} ${(side - x(g)).toFixed(1)}h0`)
      .join("");
  const said = h("p.quiet.said", "Point at a dot to see its feature; click to open it.");
  const spot = svg("circle", { class: "spot", r: 5, visibility: "hidden" });
  const ticks = [0, 0.5, 1].flatMap((value) => [
    svg("text", { x: x(value), y: side + 16, "text-anchor": "middle" }, String(value)),
    svg("text", { x: -8, y: side - x(value) + 4, "text-anchor": "end" }, String(value)),
  ]);
  const label =
    `Scatter plot of ${plural(points.length, "feature")}: ${symbol} G, the match in the group that should share it ` +
    `(upwards), against ${symbol} H, the match in the other group (to the right). The table below has every number.`;
  const drawing = svg(
    "svg",
    {
      viewBox: `-44 -10 ${side + 60} ${side + 50}`,
      role: "img",
      "aria-label": label,
    },
    svg("path", { class: "axes", d: `M0 0V${side}H${side}M0 ${side}L${side} 0` }),
    ...ticks,
    svg(
      "text",
      { x: side / 2, y: side + 34, "text-anchor": "middle" },
      `${symbol} H: largest in the group that should not share it`,
    ),
    svg(
      "text",
      { transform: `translate(-32 ${side / 2}) rotate(-90)`, "text-anchor": "middle" },
      `${symbol} G: smallest in the group that should share it`,
    ),
    svg("path", { class: "dots", d: dots(ranking.top) }),
    svg("path", { class: "dots best", d: dots(0, ranking.top) }),
    spot,
  );
  let nearest = -1;
  drawing.addEventListener("pointermove", (event) => {
    const { x: left, y: down } = new DOMPoint(event.clientX, event.clientY).matrixTransform(
      drawing.getScreenCTM().inverse(),
    );
    let least = 15 ** 2;
    nearest = -1;
    points.forEach(([h, g], row) => {
      if (h === null || g === null) return;
      const far = (x(h) - left) ** 2 + (side - x(g) - down) ** 2;
      if (far < least) [least, nearest] = [far, row];
    });
    spot.setAttribute("visibility", nearest < 0 ? "hidden" : "visible");
    if (nearest < 0) return;
    spot.setAttribute("cx", x(points[nearest][0]));
    spot.setAttribute("cy", side - x(points[nearest][1]));
    said.replaceChildren(`Feature ${ranking.features[nearest]}: `, named(called(nearest)));
  });
  drawing.addEventListener("click", () => {
    if (nearest >= 0) location.hash = featureLink({ ...at, feature: ranking.features[nearest] });
  });
  const count = (has) => whole(points.filter(([h, g]) => h !== null && g !== null && has(h, g)).length);
  const counts =
    `${count((h, g) => g > h)} above the diagonal (${symbol} G > ${symbol} H), ${count((h, g) => g < h)} below, ` +
    `${count((h, g) => h === 0 && g === 0)} with both 0 (no match). Large dots: the top 1% by Δ.`;
  return h("figure.scatter", drawing, h("figcaption.quiet", counts), said);
}

/** Rows by the most frequent word of their names. */
function typology(names) {
  const count = new Map();
  const parts = (name) => (name ?? "").toLowerCase().split(/\s*,\s*/);
  const split = names.map((name) => [...new Set(parts(name).filter(Boolean))]);
  for (const word of split.flat()) count.set(word, (count.get(word) ?? 0) + 1);
  const groups = new Map();
  split.forEach((list, row) => {
    const word = list.sort((a, b) => count.get(b) - count.get(a) || (a < b ? -1 : 1))[0] ?? null;
    groups.set(word, [...(groups.get(word) ?? []), row]);
  });
  return [...groups].sort(([a, x], [b, y]) => (a === null) - (b === null) || y.length - x.length || (a < b ? -1 : 1));
}

/** Caption words that are more frequent among the top 1% than among all features. */
function topics({ topics }) {
  const most = Math.max(...topics.map((topic) => topic.top_share));
  return section(
    "Words of the top 1%",
    h(
      "p.quiet",
      topics.length
        ? "Words in the captions of the strongest samples that are more frequent among the top 1% than among as many " +
            "random features, at a false discovery rate of 5%."
        : "No word in the captions of the strongest samples is clearly more frequent among the top 1% than among as many " +
            "random features, at a false discovery rate of 5%.",
    ),
    topics.length > 0 &&
      h(
        "div.scroll",
        h(
          "table.listing",
          h(
            "thead",
            h(
              "tr",
              ["Word", "Features", "Share in top 1%", "Share in all", "q"].map((label, at) =>
                h("th", { scope: "col", class: at ? "number" : null }, label),
              ),
            ),
          ),
          h(
            "tbody",
            topics.map(({ word, features, top_share, share, q }) =>
              h(
                "tr",
                h("th", { scope: "row" }, words(word), meter(top_share / most)),
                [whole(features), percent(top_share), percent(share), size(q)].map((text) => h("td.number", text)),
              ),
            ),
          ),
        ),
      ),
  );
}

function overlaps(ranking, calibrated) {
  const related = study.overlaps
    .filter(inSet(ranking))
    .filter((entry) => [entry.first, entry.second].includes(ranking.name));
  if (!related.length) return null;
  const topOf = (one) => (calibrated ? one.calibrated : one).features.slice(0, one.top);
  const top = topOf(ranking);
  return section(
    "Overlap with other rankings",
    h(
      "div.scroll",
      h(
        "table.listing",
        h(
          "thead",
          h(
            "tr",
            ["Ranking", "Top", "In both", "By chance", "p", "Features"].map((label, at) =>
              h("th", { scope: "col", class: at % 5 ? "number" : null }, label),
            ),
          ),
        ),
        h(
          "tbody",
          related.map((entry) => {
            const name = entry.first === ranking.name ? entry.second : entry.first;
            const other = rankingNamed(name, ranking);
            const alike = other?.source === ranking.source && other.layer === ranking.layer;
            const theirs = new Set(alike ? topOf(other) : []);
            const [overlap, p] = calibrated
              ? [entry.calibrated_overlap, entry.calibrated_log10_p]
              : [entry.overlap, entry.log10_p];
            const both = top.filter((feature) => theirs.has(feature));
            const at = { ...ranking, member: ranking.source };
            return h(
              "tr",
              h("th", { scope: "row" }, other ? anchor(rankingLink(other), name) : name),
              [whole(entry.top), whole(overlap), size(entry.expected), probability(p)].map((text) =>
                h("td.number", text),
              ),
              h(
                "td",
                both.flatMap((feature) => [anchor(featureLink({ ...at, feature }), String(feature)), " "]),
              ),
            );
          }),
        ),
      ),
    ),
  );
}

async function rankingView(parts) {
  const [dataset, sae, name] = parts;
  const ranking = found(rankingNamed(name, { dataset, sae }), `There is no ranking “${plain(name)}”.`);
  const at = { dataset, sae, member: ranking.source, layer: ranking.layer };
  const table = await loadTable(at);
  const choice = control("Value", "value", {}, Object.entries(RANKINGS));
  const body = h("div");
  let value = null;
  let content = null;
  const [shared, others] = [ranking.shared_with, ranking.not_shared_with].map((members) => members.join(", "));
  return {
    title: `Ranking ${name}`,
    at,
    crumbs: [crumb(at), [`Ranking ${name}`, rankingLink(ranking)]],
    nodes: [
      h(
        "p.lead",
        `Features of ${at.member}, layer ${at.layer}, by how much more they are shared with ${shared} than with ${others}.`,
      ),
      choice.node,
      body,
    ],
    update: (query) => {
      choice.sync(query);
      const chosen = query.get("value") === "calibrated" ? "calibrated" : "published";
      if (value !== chosen) {
        value = chosen;
        content = rankingContent(ranking, value, at, table);
        body.replaceChildren(...content.nodes.flat().filter(Boolean));
      }
      content.update(query);
    },
  };
}

/** What a ranking's page shows of the published or the calibrated ranking. */
function rankingContent(published, value, at, table) {
  const calibrated = value === "calibrated";
  const ranking = calibrated ? { ...published, ...published.calibrated } : published;
  const symbol = calibrated ? "e" : "ρ";
  const measure = calibrated ? "excess over chance" : "best correlation";
  const feature = (row) => ranking.features[row];
  const here = (row) => ({ ...at, feature: feature(row) });
  const called = (row) => calledIn(table, feature(row));
  const list = listing({
    caption: `Features of ${at.member}, layer ${at.layer}, ranked by ${ranking.name}`,
    columns: [
      {
        id: "rank",
        label: "Rank",
        rising: true,
        value: (row) => row + 1,
        cell: (row) => [row < ranking.top && h("span.badge", "top 1%"), ` ${whole(row + 1)}`],
      },
      numberColumn("feature", "Feature", feature),
      nameColumn("Name", "name", here, called),
      imagesColumn("images", here),
      plainColumn("delta", "Δ", `Comparative Sharedness: S (${symbol} G² − ${symbol} H²)`, ranking.delta, size),
      plainColumn("rho_g", `${symbol} G`, `Smallest ${measure} in the group that should share it`, ranking.rho_g, rho),
      plainColumn("rho_h", `${symbol} H`, `Largest ${measure} in the group that should not share it`, ranking.rho_h, rho),
      plainColumn("share", "Top share", "Share of resamples in which it is in the top 1%", ranking.share, percent),
    ],
    count: ranking.features.length,
    sorted: "+rank",
    unit: "feature",
    controls: [search("Name or number"), checkbox("Top 1% only", "top"), checkbox("Named only", "named"), imagesBox()],
    keep: (query) => {
      const wanted = searching(query);
      return (row) =>
        wanted(feature(row), called(row)) &&
        (query.get("top") !== "yes" || row < ranking.top) &&
        (query.get("named") !== "yes" || called(row).name !== null);
    },
  });
  const top = ranking.features.slice(0, ranking.top);
  const groups = typology(top.map((number) => table.name[number]));
  const most = Math.max(...groups.map(([, rows]) => rows.length));
  return {
    nodes: [
      h(
        "p.note",
        `Δ = S (${symbol} G² − ${symbol} H²). Matches are between last layers: ${symbol} G is the smallest ${measure} in ` +
          `the first group, ${symbol} H the largest in the second. Other layers may match better. ` +
          (calibrated
            ? "e = (ρ − null) / (1 − null), at least 0, where the null is a feature’s best correlation with samples " +
              "re-paired at random: a wider encoder matches better by chance. "
            : "") +
          "The top share is the share of bootstrap resamples in which a feature is in the top 1%.",
        ranking.unexplained && [" Last ", ...unexplained(at), `: ${ranking.unexplained}.`],
      ),
      h(
        "div.split",
        section("Match in both groups", scatter(ranking, at, called, symbol)),
        section(
          "Top 1% by topic",
          h("p.quiet", `${plural(ranking.top, "feature")}, grouped by the most frequent word in the names.`),
          h(
            "div.types",
            groups.map(([word, rows]) =>
              h(
                "details",
                h("summary", named({ name: word }), h("span.tally", String(rows.length)), meter(rows.length / most)),
                h(
                  "ul",
                  rows.map((row) =>
                    h("li", anchor(featureLink({ ...at, feature: top[row] }), `${top[row]} `, named(called(row)))),
                  ),
                ),
              ),
            ),
          ),
        ),
      ),
      topics(ranking),
      overlaps(ranking, calibrated),
      section("Ranking", list.nodes),
    ],
    update: list.update,
  };
}
