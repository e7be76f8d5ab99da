// One feature.

function match(at, n, name, best) {
  const [value, layer, feature] = [best.rho[n], best.layer[n], best.feature[n]];
  const other = memberNamed(name);
  const head = [h("h3", name), h("p.quiet", describe(other))];
  if (layer < 0) return h("li.match", head, h("p", "No match: nothing correlates."));
  const there = { ...at, member: name, layer, feature };
  const label = h("span.name");
  const samples = lazily(h("div.samples"), async () => {
    const found = await loadFeature(there);
    label.replaceChildren(named(found));
    return specimens(at, found.top.slice(0, 3), found.tokens);
  });
  return h(
    "li.match",
    head,
    h("p", h("span.large", term("ρ"), " ", rho(value))),
    h("p.where", anchor(featureLink(there), `Layer ${layer}, feature ${feature}`), " ", label),
    samples,
  );
}

function facts(pairs) {
  return h(
    "dl.facts",
    pairs.map(([term, ...values]) => h("div", h("dt", term), h("dd", values))),
  );
}

async function featureView(parts) {
  const at = place(parts);
  const member = memberNamed(at.member);
  const n = at.feature;
  const [table, feature] = await Promise.all([loadTable(at), loadFeature(at)]);
  const called = calledIn(table, n);
  const rank = table.strength.filter((strength) => strength > table.strength[n]).length + 1;
  const others = othersOf(table);
  const samples = h("div.samples");
  await fill(samples, () => specimens(at, feature.top, feature.tokens));
  const bands = feature.bands.filter((band) => band.samples.length);

  const overlay = checkbox("Where it fires", "overlay");
  const key = h("div.key", { hidden: true });
  async function drawOverlay() {
    if (!feature.mapped) return;
    const on = current.query.get("overlay") === "yes";
    const maps = on ? await loadMaps(at) : [];
    if (on !== (current?.query.get("overlay") === "yes")) return;
    const most = Math.max(0, ...maps.map((map) => map?.max ?? 0));
    key.hidden = !on;
    key.replaceChildren(legend({ low: 0, high: most }, "how strongly it fires", size));
    samples.classList.toggle("overlaid", on);
    samples.querySelectorAll(".thumbnail").forEach((frame, at) => {
      frame.querySelector("canvas")?.remove();
      if (maps[at] && frame.querySelector("img")) frame.append(heat(maps[at], most));
    });
  }
  const deltas = Object.entries(table.delta).filter(([, values]) => values[n] !== null);
  const step = (to, text, rel) =>
    to >= 0 && to < member.features[at.sae]
      ? h("a", { href: featureLink({ ...at, feature: to }), rel }, text)
      : h("span.quiet", text);

  return {
    title: `Feature ${n} of ${at.member}, layer ${at.layer}`,
    at,
    crumbs: [crumb(at), [`Feature ${n}`, featureLink(at)]],
    nodes: [
      h(
        "p.called",
        named(called),
        called.name === null && called.candidate && h("span.quiet", ` (${UNNAMED})`),
        table.by_command && h("span.quiet", " (named by a command)"),
      ),
      h(
        "nav.steps",
        { "aria-label": "Neighbouring features" },
        step(n - 1, "← Previous", "prev"),
        step(n + 1, "Next →", "next"),
      ),
      marker(at),
      warning(at, table),
      facts([
        [term("Name z"), fixed(table.score[n])],
        [term("Name AUC"), fixed(table.auc[n])],
        [
          term("S"),
          size(table.strength[n]),
          feature.top.length > 0 && h("span.quiet", ` rank ${whole(rank)} of ${whole(table.strength.length)}`),
        ],
        [term("Density"), percent(table.density[n])],
        ...deltas.map(([ranking, values]) => {
          const entry = rankingNamed(ranking, at);
          return [[term("Δ"), " ", entry ? anchor(rankingLink(entry), ranking) : ranking], size(values[n])];
        }),
      ]),
      section(
        "Strongest samples",
        h(
          "p.note",
          feature.top.length
            ? member.modality === "text"
              ? "The encoder reads only the captions; their images are shown as context."
              : "The encoder sees only the images; captions, and the names derived from them, are shown as context."
            : "This feature was never active on these samples.",
          study.codes[0] === "after_topk" &&
            (feature.mapped || feature.tokens) &&
            " Values of samples are after TopK, those of tokens before it.",
        ),
        feature.mapped && h("div.toggle", overlay.node, key),
        feature.top.length > 0 && samples,
      ),
      bands.length > 0 &&
        section(
          "Weaker samples",
          h(
            "p.note",
            "The strongest samples show a feature at its clearest. If these show something else, do not trust its name.",
          ),
          bands.flatMap((band) => [
            h("h3", `Around the ${Math.round(100 * band.at)}th percentile of its nonzero activations`),
            lazily(h("div.samples.band"), () => specimens(at, band.samples)),
          ]),
        ),
      feature.histogram?.counts.some(Boolean) && section("Activations", histogram(feature.histogram)),
      others.length > 0 &&
        section(
          "Best match in every other member",
          h("p.note", `Over all ${explained()}layers of the other member. The best of many correlations is above 0 even by chance.`),
          h(
            "ul.matches",
            others.map((other) => match(at, n, other, table.best[other])),
          ),
        ),
    ],
    update(query) {
      overlay.sync(query);
      drawOverlay().catch((error) => {
        if (!(error instanceof FileError)) throw error;
        key.hidden = false;
        key.replaceChildren(h("span.error", error.message));
      });
    },
  };
}
