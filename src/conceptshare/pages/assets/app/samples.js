// Samples: thumbnails, captions, and where a feature fires in them.

const SIDE = 160; // of a thumbnail, at most
const LEAST = 96; // of the longer side of an image as shown: icons are magnified

/** A thumbnail, or a space of its size if there is none. */
function thumbnail(sample, alt) {
  const sides = sample.size ?? [SIDE, 0.75 * SIDE];
  const [width, height] = sides.map((side) => Math.ceil(side * Math.max(1, LEAST / Math.max(...sides))));
  const missing = () =>
    h(
      "span.gone",
      {
        role: "img",
        "aria-label": `No image. ${alt}`,
        style: { width: `${width}px`, aspectRatio: `${width} / ${height}` },
      },
      h("span", { "aria-hidden": "true" }, "no image"),
    );
  const onerror = () => frame.replaceChildren(missing());
  const image = { alt, width, height, loading: "lazy", decoding: "async", src: sample.source, onerror };
  const frame = h("span.thumbnail", sample.size ? h("img", image) : missing());
  return frame;
}

/** The strongest images of a feature, small, when they come into view. */
function strip(at, count) {
  return lazily(h("span.strip"), async () => {
    const { top } = await loadFeature(at);
    if (!top.length) return h("span.quiet", "never active");
    const samples = await Promise.all(top.slice(0, count).map(([sample]) => loadSample(at.dataset, sample)));
    return samples.map((sample) => {
      const frame = thumbnail(sample, plain(sample.caption));
      frame.title = plain(sample.caption);
      return frame;
    });
  });
}

function tokenText({ text, values }, most) {
  return text.flatMap((piece, at) => {
    const token = piece.trim() || piece; // for some tokenizers, a blank is a token
    const value = values[at] ?? 0;
    const share = value > 0 && most > 0 ? Math.min(value / most, 1) : 0;
    const mark = share ? h("mark", { title: size(value) }, words(token)) : h("span", words(token));
    if (share) mark.style.setProperty("--share", share.toFixed(3));
    return [piece.startsWith(" ") && token !== piece ? " " : "", mark];
  });
}

function heat(map, most) {
  const bytes = atob(map.values);
  const canvas = h("canvas", { width: map.columns, height: map.rows, role: "img" });
  const [x0, y0, x1, y1] = map.box.map((share) => 100 * share);
  Object.assign(canvas.style, { left: `${x0}%`, top: `${y0}%`, width: `${x1 - x0}%`, height: `${y1 - y0}%` });
  const pixels = new ImageData(map.columns, map.rows);
  let strongest = 0;
  for (let cell = 0; cell < bytes.length; cell++) {
    const share = (bytes.charCodeAt(cell) / 255) * (most > 0 ? map.max / most : 0);
    pixels.data.set([...viridis(share).colour, 255 * (0.45 + 0.3 * share)], 4 * cell);
    if (bytes.charCodeAt(cell) > bytes.charCodeAt(strongest)) strongest = cell;
  }
  canvas.getContext("2d").putImageData(pixels, 0, 0);
  const row = Math.floor(strongest / map.columns) + 1;
  canvas.setAttribute(
    "aria-label",
    map.max > 0
      ? `It fires most in row ${row} of ${map.rows}, column ${(strongest % map.columns) + 1} of ${map.columns}.`
      : "It fires nowhere.",
  );
  return canvas;
}

const sampleLink = (at, sample) => link("sample", [at.dataset, at.sae, sample]);

/** A sample with its value, if any, its caption and, for text encoders, its tokens marked by activation. */
function specimen(at, sample, value, text, write = size) {
  const label = sample.caption.trim() ? words(sample.caption) : h("span.quiet", "no caption");
  // A long caption can be focused, which shows all of it.
  const long = sample.caption.length > 60;
  return h(
    "figure.specimen",
    h(
      "a",
      { href: sampleLink(at, String(sample.sample)), "aria-label": `Sample ${sample.sample}` },
      thumbnail(sample, `Image of sample ${sample.sample}`),
    ),
    h(
      "figcaption",
      value !== undefined && h("span.value", write(value)),
      h("span.caption", { tabindex: long ? 0 : null }, label),
      text && h("span.tokens", text),
    ),
  );
}

/** A feature's values on samples, with its activations at their tokens for text encoders. */
function specimens(at, list, tokens, write = size) {
  const most = Math.max(0, ...(tokens ?? []).flatMap((entry) => entry?.values ?? []));
  return Promise.all(
    list.map(async ([sample, value], place) =>
      specimen(at, await loadSample(at.dataset, sample), value, tokens?.[place] ? tokenText(tokens[place], most) : null, write),
    ),
  );
}

function histogram({ max, counts }) {
  const total = counts.reduce((sum, count) => sum + count, 0);
  const highest = Math.max(...counts, 1);
  const fullest = counts.indexOf(Math.max(...counts));
  const bin = max / counts.length;
  const wide = 400 / counts.length;
  const bars = counts.map((count, at) => {
    const high = (100 * count) / highest;
    return svg("rect", { x: at * wide + 0.5, y: 100 - high, width: wide - 1, height: high });
  });
  const text =
    `Histogram of ${plural(total, "activation")} above zero, from 0 to ${size(max)} in ${counts.length} equal bins. ` +
    `The fullest, from ${size(fullest * bin)} to ${size((fullest + 1) * bin)}, holds ${whole(counts[fullest])}.`;
  return h(
    "figure.histogram",
    svg(
      "svg",
      { viewBox: "0 0 400 101", role: "img", "aria-label": text, preserveAspectRatio: "none" },
      ...bars,
      svg("line", { x1: 0, x2: 400, y1: 100.5, y2: 100.5 }),
    ),
    h("div.ends", { "aria-hidden": "true" }, h("span", "0"), h("span", size(max))),
    h("figcaption", text),
  );
}
