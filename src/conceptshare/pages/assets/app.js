"use strict";

(() => {
  const ROWS = 100; // of a table, on one page
  const BLOCK = 64; // features in a file of details
  const SAMPLES = 500; // in a file of captions, and in a folder of thumbnails
  const SIDE = 160; // of a thumbnail, at most
  const LEAST = 96; // of the longer side of a picture that is shown: icons are magnified
  const UNNAMED = "no clear name";
  const ANY = "any"; // in place of the number of a layer
  const VIRIDIS = "440154481a6c472f7d41448739568c31688e2a788e23888e1f988b22a88435b77954c5687ad151a5db36d2e21bfde725"
    .match(/.{6}/g)
    .map((colour) => [0, 2, 4].map((at) => parseInt(colour.slice(at, at + 2), 16)));

  // Data files ------------------------------------------------------------------------------------------------------

  const arrived = new Map();
  const files = new Map();
  window.conceptshare = { add: (key, value) => arrived.set(key, value) };

  // The page's policy lets no text become a script or markup, but for the addresses of data files.
  const addresses = window.trustedTypes
    ? window.trustedTypes.createPolicy("data-files", { createScriptURL: (address) => address })
    : { createScriptURL: (address) => address };

  class FileError extends Error {
    constructor(key, what, title = "A file cannot be read") {
      super(`${key}.js ${what}`);
      this.title = title;
    }
  }

  async function unpack(key, value) {
    try {
      const bytes = Uint8Array.from(atob(value), (character) => character.charCodeAt(0));
      return await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
    } catch {
      throw new FileError(key, "could not be unpacked.");
    }
  }

  function request(key) {
    return new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = addresses.createScriptURL(`${key.split("/").map(encode).join("/")}.js`);
      script.onload = () => {
        script.remove();
        if (!arrived.has(key)) return reject(new FileError(key, "does not hold what its name says."));
        resolve(unpack(key, arrived.get(key)));
        arrived.delete(key);
      };
      script.onerror = () => {
        script.remove();
        reject(new FileError(key, "is missing.", "A file is missing"));
      };
      document.head.append(script);
    });
  }

  /** A data file, which is read once; one that could not be read is tried again when next asked for. */
  function load(key) {
    if (!files.has(key)) {
      files.set(key, request(key));
      files.get(key).catch(() => files.delete(key));
    }
    return files.get(key);
  }

  const three = (number) => String(number).padStart(3, "0");
  const folder = (at) => `data/${at.dataset}/${at.sae}`;
  const layerFile = (layer) => `layer-${String(layer).padStart(2, "0")}`;
  const loadTable = (at) => load(`${folder(at)}/${at.member}/${layerFile(at.layer)}`);

  const loadBlock = (at, kind) =>
    load(`${folder(at)}/${at.member}/${layerFile(at.layer)}/${kind}${three(Math.floor(at.feature / BLOCK))}`);

  async function loadFeature(at) {
    const { first, features } = await loadBlock(at, "");
    return features[at.feature - first];
  }

  async function loadMaps(at) {
    const { first, maps } = await loadBlock(at, "maps-");
    return maps[at.feature - first];
  }

  async function loadSample(dataset, sample) {
    const number = Math.floor(sample / SAMPLES);
    const { captions, sizes } = await load(`samples/${dataset}/${three(number)}`);
    const at = sample - number * SAMPLES;
    const name = String(sample).padStart(6, "0");
    const source = `samples/${encode(dataset)}/${three(number)}/${name}.webp`;
    return { sample, caption: captions[at] ?? "", size: sizes[at], source };
  }

  // Elements --------------------------------------------------------------------------------------------------------

  /** An element. Texts become text nodes and attributes, never markup. */
  function h(tag, properties, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties ?? {})) {
      if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else if (name === "style") Object.assign(element.style, value);
      else if (value !== null && value !== undefined && value !== false)
        element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return element;
  }

  function svg(tag, attributes, ...children) {
    const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  /** For titles and labels, where nothing isolates marks of direction and control characters. */
  const plain = (text) => text.replace(/[\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069]+/g, " ");
  const words = (text) => h("bdi", {}, text);
  /** What a feature is called: its name, or in grey the best words found, which are not clear enough to be one. */
  const named = ({ name, candidate }) =>
    name?.trim()
      ? words(name)
      : h("span", { class: "quiet" }, candidate?.trim() ? ["perhaps ", words(candidate)] : UNNAMED);
  const calledIn = (table, feature) => ({ name: table.name[feature], candidate: table.candidate[feature] });

  const whole = (number) => number.toLocaleString("en");
  const or = (number, write) => (number === null || number === undefined ? "–" : write(number));
  const fixed = (number) => or(number, (value) => value.toFixed(2));
  const size = (number) =>
    or(number, (value) => (Math.abs(value) >= 1000 ? whole(Math.round(value)) : String(Number(value.toPrecision(3)))));
  const percent = (number) => or(number, (value) => `${Number((100 * value).toPrecision(3))}%`);
  const plural = (number, one) => `${whole(number)} ${one}${number === 1 ? "" : "s"}`;

  function probability(log10) {
    if (log10 === null || log10 === undefined) return "–";
    if (log10 > -3) return (10 ** log10).toPrecision(2);
    const power = Math.floor(log10);
    const raised = String(power).replace(/./g, (digit) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[digit] ?? "⁻");
    return `${(10 ** (log10 - power)).toFixed(1)} × 10${raised}`;
  }

  /** Colour of a share of the scale, and black or white, whichever is read better on it. */
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

  const watcher = new IntersectionObserver(
    (entries) => {
      for (const { target, isIntersecting } of entries)
        if (isIntersecting) {
          watcher.unobserve(target);
          fill(target, target.whenSeen);
        }
    },
    { rootMargin: "400px" },
  );

  async function fill(element, make) {
    try {
      element.replaceChildren(...[await make()].flat());
    } catch (error) {
      if (!(error instanceof FileError)) throw error;
      element.replaceChildren(h("span", { class: "error" }, error.message));
    }
  }

  /** Fill an element when it comes into view. */
  function lazily(element, make) {
    element.whenSeen = make;
    watcher.observe(element);
    return element;
  }

  // Addresses -------------------------------------------------------------------------------------------------------

  let study = null;

  function encode(text) {
    return encodeURIComponent(text).replaceAll("%40", "@");
  }

  function link(kind, parts, query) {
    const search = new URLSearchParams(query ?? {}).toString();
    return `#/${[kind, ...parts].map(encode).join("/")}${search && `?${search}`}`;
  }

  const tableLink = (at, query) => link("layer", [at.dataset, at.sae, at.member, at.layer], query);
  const featureLink = (at) => link("feature", [at.dataset, at.sae, at.member, at.layer, at.feature]);
  const pairLink = (at, a, i, b, j) => link("pair", [at.dataset, at.sae, a, i, b, j]);
  const rankingLink = (ranking) => link("ranking", [ranking.dataset, ranking.sae, ranking.name]);

  class NotFound extends Error {}

  function found(value, message) {
    if (value === undefined) throw new NotFound(message);
    return value;
  }

  /** Those of the study's members that a table tells of, in the order of the study. */
  const othersOf = (table) => study.members.map(({ name }) => name).filter((name) => Object.hasOwn(table.best, name));

  const memberNamed = (name) =>
    found(
      study.members.find((member) => member.name === name),
      `There is no member “${plain(name)}”.`,
    );

  /** Which data set, SAE setting, member, layer and feature an address means, all of them there in the study. */
  function place([dataset, sae, member, layer, feature]) {
    if (!study.datasets.some(({ name }) => name === dataset))
      throw new NotFound(`There is no data set “${plain(dataset ?? "")}”.`);
    if (!study.saes.includes(sae)) throw new NotFound(`There is no SAE setting “${plain(sae ?? "")}”.`);
    const at = { dataset, sae };
    if (member === undefined) return at;
    const { layers, features } = memberNamed(member);
    at.member = member;
    at.layer = found(
      layers.find((number) => String(number) === layer),
      `${member} has no layer “${plain(layer ?? "")}”.`,
    );
    if (feature === undefined) return at;
    if (!/^\d{1,9}$/.test(feature) || Number(feature) >= features[sae])
      throw new NotFound(`${member} has features 0 to ${features[sae] - 1}, and no “${plain(feature)}”.`);
    at.feature = Number(feature);
    return at;
  }

  // Controls and tables ---------------------------------------------------------------------------------------------

  let current = null; // the view that is shown: its path, query and update()
  let typed = {}; // what was typed and is not in the address yet
  let timer = 0;

  function change(changes, push) {
    clearTimeout(timer);
    if (!current) return;
    const query = new URLSearchParams(current.query);
    query.delete("page");
    const all = { ...typed, ...changes };
    typed = {};
    for (const [key, value] of Object.entries(all)) value ? query.set(key, value) : query.delete(key);
    const search = query.toString();
    const address = `#${current.path}${search && `?${search}`}`;
    if (push) remember(() => history.pushState({ entry: newEntry() }, "", address));
    else history.replaceState(history.state, "", address);
    current.query = query;
    current.update(query);
  }

  /** A labelled input or select, whose value is in the address. */
  function control(label, key, attributes, options) {
    const box = attributes.type === "checkbox";
    const input = h(
      options ? "select" : "input",
      { ...attributes, autocomplete: "off" },
      (options ?? []).map(([value, text]) => h("option", { value }, text)),
    );
    const off = attributes["data-off"] ?? "";
    if (box || options)
      input.addEventListener("change", () => change({ [key]: !box || input.checked ? input.value : off }, true));
    else
      input.addEventListener("input", () => {
        typed[key] = input.value;
        clearTimeout(timer);
        timer = setTimeout(() => change({}, false), 120);
      });
    const sync = (query) => {
      const value = query.get(key) ?? "";
      if (box) input.checked = value === attributes.value;
      else if (input.value !== value && document.activeElement !== input) input.value = value;
      if (options && input.selectedIndex < 0) input.selectedIndex = 0;
    };
    return { node: h("label", { class: box ? "check" : "field" }, box ? [input, label] : [label, input]), sync };
  }

  const limit = (query, key) => {
    const text = query.get(key);
    return text === null || !Number.isFinite(Number(text)) ? null : Number(text);
  };

  /** Whether a row is kept by a query; the empty query keeps all. Nothing is known of a null, so limits drop it. */
  function between(value, low, high) {
    if (low === null && high === null) return true;
    return value !== null && value !== undefined && (low === null || value >= low) && (high === null || value <= high);
  }

  function searching(query) {
    const text = (query.get("q") ?? "").trim().toLowerCase();
    const number = /^#?\d+$/.test(text) ? Number(text.replace("#", "")) : null;
    return (feature, called) =>
      !text || feature === number || (called?.name ?? called?.candidate ?? "").toLowerCase().includes(text);
  }

  /**
   * A table with filters, sorting and pages, all of it in the address.
   *
   * Columns are {id, label, value(row), cell(row), text}; the one with `heading` names the row.
   */
  function listing({ caption, columns, count, sorted, controls, keep, unit }) {
    const status = h("p", { role: "status", class: "count" });
    const body = h("tbody");
    const pager = h("nav", { class: "pager", "aria-label": "Pages of the table" });
    const heads = columns.map((column) =>
      h(
        "th",
        {
          scope: "col",
          class: `${column.text || !column.value ? "" : "number"}${column.label.length > 16 ? " long" : ""}`,
        },
        column.value
          ? h("button", { type: "button", title: column.title, onclick: () => sort(column) }, column.label)
          : h("span", {}, column.label),
      ),
    );
    const readSort = (query) => {
      const text = query.get("sort") ?? "";
      const column = columns.find(({ id, value }) => value && (text === id || text === `-${id}`));
      if (column) return { column, down: text.startsWith("-") };
      return { column: columns.find(({ id }) => id === sorted.slice(1)), down: sorted[0] === "-" };
    };
    function sort(column) {
      const now = readSort(current.query);
      const down = now.column === column ? !now.down : !column.text && !column.rising;
      change({ sort: `${down ? "-" : ""}${column.id}` }, true);
    }
    const step = (page, label, enabled) =>
      h("button", { type: "button", disabled: !enabled, onclick: () => turnTo(page) }, label);
    function turnTo(page) {
      change({ page: page > 1 ? String(page) : "" }, true);
      frame.scrollIntoView();
      (pager.querySelector("button:not([disabled])") ?? frame).focus({ preventScroll: true });
    }
    const frame = h(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
      h(
        "table",
        { class: "listing" },
        h("caption", { class: "hidden" }, caption),
        h("thead", {}, h("tr", {}, heads)),
        body,
      ),
    );

    function update(query) {
      for (const { sync } of controls) sync(query);
      const { column, down } = readSort(query);
      heads.forEach((head, at) => {
        if (columns[at].value)
          head.setAttribute("aria-sort", columns[at] === column ? (down ? "descending" : "ascending") : "none");
      });
      const kept = keep(query);
      const rows = [];
      for (let row = 0; row < count; row++) if (kept(row)) rows.push(row);
      const values = new Map(rows.map((row) => [row, column.value(row)]));
      const sign = down ? -1 : 1;
      rows.sort((a, b) => {
        const [x, y] = [values.get(a) ?? null, values.get(b) ?? null];
        if (x === null || y === null) return (x === null) - (y === null) || a - b;
        return (x < y ? -sign : x > y ? sign : 0) || a - b;
      });
      const pages = Math.max(1, Math.ceil(rows.length / ROWS));
      const page = Math.min(Math.max(1, Math.trunc(limit(query, "page") ?? 1)), pages);
      const shown = rows.slice((page - 1) * ROWS, page * ROWS);
      status.textContent =
        rows.length === count ? plural(count, unit) : `${whole(rows.length)} of ${plural(count, unit)}`;
      body.querySelectorAll(".strip").forEach((strip) => watcher.unobserve(strip));
      body.replaceChildren(
        ...shown.map((row) =>
          h(
            "tr",
            {},
            columns.map((column) =>
              h(
                column.heading ? "th" : "td",
                { scope: column.heading ? "row" : null, class: column.text || !column.value ? column.id : "number" },
                column.cell(row),
              ),
            ),
          ),
        ),
      );
      const none = `No ${unit} is left by these filters.`;
      if (!shown.length) body.append(h("tr", {}, h("td", { colspan: columns.length }, none)));
      pager.hidden = pages === 1;
      pager.replaceChildren(
        step(1, "First", page > 1),
        step(page - 1, "Previous", page > 1),
        h("span", {}, `Page ${page} of ${pages}`),
        step(page + 1, "Next", page < pages),
        step(pages, "Last", page < pages),
      );
    }
    const filters = h(
      "form",
      {
        class: "filters",
        role: "search",
        "aria-label": `Filter ${unit}s`,
        onsubmit: (event) => event.preventDefault(),
      },
      controls.map(({ node }) => node),
    );
    return { nodes: [filters, status, frame, pager], update };
  }

  const search = (label) => control(label, "q", { type: "search" });
  const number = (label, key) => control(label, key, { type: "number", step: "any" });
  const picturesBox = () => control("Pictures", "pictures", { type: "checkbox", value: "", "data-off": "no" });

  /** Numbers of layers as links, the present one marked. */
  const layerLinks = (label, layers, chosen, address) =>
    h(
      "nav",
      { class: "layers", "aria-label": label },
      h("span", { "aria-hidden": "true" }, label),
      h(
        "ul",
        {},
        layers.map(
          (layer) => h(
            "li",
            {},
            h("a", { href: address(layer), "aria-current": layer === chosen ? "page" : null }, String(layer)),
          ),
        ),
      ),
    );

  /** A correlation with a bar as long as it is. */
  const rho = (value) =>
    h(
      "span",
      { class: "rho" },
      fixed(value),
      h(
        "span",
        { class: "meter", "aria-hidden": "true" },
        h("span", { style: { width: `${100 * Math.min(Math.max(value ?? 0, 0), 1)}%` } }),
      ),
    );

  // Pictures and texts ----------------------------------------------------------------------------------------------

  /** A thumbnail, or where there is none a space as large as it. */
  function picture(sample, alt) {
    const sides = sample.size ?? [SIDE, 0.75 * SIDE];
    const [width, height] = sides.map((side) => Math.ceil(side * Math.max(1, LEAST / Math.max(...sides))));
    const missing = () =>
      h(
        "span",
        {
          class: "gone",
          role: "img",
          "aria-label": `No picture. ${alt}`,
          style: { width: `${width}px`, aspectRatio: `${width} / ${height}` },
        },
        h("span", { "aria-hidden": "true" }, "no picture"),
      );
    const frame = h("span", { class: "picture" });
    if (!sample.size) frame.append(missing());
    else
      frame.append(
        h(
          "img",
          {
            alt,
            width,
            height,
            loading: "lazy",
            decoding: "async",
            src: sample.source,
            onerror: () => frame.replaceChildren(missing()),
          },
        ),
      );
    return frame;
  }

  /** The first pictures of a feature, small, when they come into view. */
  function strip(at, pictures) {
    return lazily(h("span", { class: "strip" }), async () => {
      const { top } = await loadFeature(at);
      if (!top.length) return h("span", { class: "quiet" }, "never active");
      const samples = await Promise.all(top.slice(0, pictures).map(([sample]) => loadSample(at.dataset, sample)));
      return samples.map((sample) => {
        const frame = picture(sample, plain(sample.caption));
        frame.title = plain(sample.caption);
        return frame;
      });
    });
  }

  function tokenText({ text, values }, most) {
    return text.flatMap((piece, at) => {
      const token = piece.trim() || piece;  // of some tokenizers, a blank is a token
      const value = values[at] ?? 0;
      const share = value > 0 && most > 0 ? Math.min(value / most, 1) : 0;
      const mark = share
        ? h("mark", { title: size(value) }, words(token))
        : h("span", {}, words(token));
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

  /** A sample with its value, under it its caption, and what the encoder reads of it, marked. */
  function specimen(sample, value, text) {
    const label = sample.caption.trim() ? words(sample.caption) : h("span", { class: "quiet" }, "no caption");
    // One who focuses a long caption reads all of it.
    const long = sample.caption.length > 60;
    return h(
      "figure",
      { class: "specimen" },
      picture(sample, `Picture of sample ${sample.sample}`),
      h(
        "figcaption",
        {},
        h("span", { class: "value" }, size(value)),
        h("span", { class: "caption", ...(long ? { tabindex: 0 } : {}) }, label),
        text ? h("span", { class: "tokens" }, text) : "",
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
      "figure",
      { class: "histogram" },
      svg(
        "svg",
        { viewBox: "0 0 400 101", role: "img", "aria-label": text, preserveAspectRatio: "none" },
        ...bars,
        svg("line", { x1: 0, x2: 400, y1: 100.5, y2: 100.5 }),
      ),
      h("div", { class: "ends", "aria-hidden": "true" }, h("span", {}, "0"), h("span", {}, size(max))),
      h("figcaption", {}, text),
    );
  }

  // Overview --------------------------------------------------------------------------------------------------------

  const byChance = (floor) => (floor === null || floor === undefined ? "" : `, by chance ${fixed(floor)}`);
  let heatmaps = 0;

  /** A heatmap: a table of links, between which arrow keys move, so that it is one stop of the Tab key. */
  function heatmap(caption, corner, rows, columns, values, floors, scale, cellLink, cellLabel) {
    const id = `heatmap-${heatmaps++}`;
    const long = Math.max(...columns.map((name) => name.length)) > 4;
    const upright = long && columns.length > 6;
    const table = h(
      "table",
      { class: `heat${long ? " long" : ""}${upright ? " upright" : ""}`, "aria-labelledby": id },
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          h("td", { class: "corner" }, corner),
          columns.map((name) => h("th", { scope: "col" }, h("span", {}, name))),
        ),
      ),
      h(
        "tbody",
        {},
        rows.map((name, row) =>
          h(
            "tr",
            {},
            h("th", { scope: "row" }, name),
            columns.map((_, column) => {
              const value = values[row]?.[column] ?? null;
              if (value === null) return h("td", { class: "null" }, h("span", { class: "hidden" }, "no value"));
              const { background, ink } = viridis((value - scale.low) / (scale.high - scale.low || 1));
              const label = `${cellLabel(row, column)}: ${fixed(value)}${byChance(floors[row]?.[column])}`;
              return h(
                "td",
                {},
                h(
                  "a",
                  {
                    href: cellLink(row, column),
                    "aria-label": label,
                    title: label,
                    tabindex: "-1",
                    style: { background, color: ink },
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
      // To the sides also from row to row, so that each cell can be reached whichever have no value.
      const links = [...table.querySelectorAll("a")];
      const column = links.filter((link) => link.parentNode.cellIndex === cell.cellIndex);
      const moves = { ArrowLeft: [links, -1], ArrowRight: [links, 1], ArrowUp: [column, -1], ArrowDown: [column, 1] };
      if (!Object.hasOwn(moves, event.key)) return;
      event.preventDefault();
      const [line, step] = moves[event.key];
      line[line.indexOf(event.target) + step]?.focus();
    });
    return h("figure", { class: "heatmap" }, h("figcaption", { id }, caption), h("div", { class: "scroll" }, table));
  }

  function legend({ low, high }, what, write, ...more) {
    const stops = VIRIDIS.map((colour) => `rgb(${colour})`).join(",");
    return h(
      "p",
      { class: "legend" },
      h("span", {}, write(low)),
      h(
        "span",
        {
          class: "ramp",
          role: "img",
          "aria-label": `Colour scale of ${what}, from dark violet at ${write(low)} to yellow at ${write(high)}`,
          style: { background: `linear-gradient(90deg, ${stops})` },
        },
      ),
      h("span", {}, write(high)),
      more,
    );
  }

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

  // Features of a layer ---------------------------------------------------------------------------------------------

  const crumb = (at) => [`${at.member}, layer ${at.layer}`, tableLink(at)];

  /** The columns that every table of features begins with. */
  const nameColumn = (label, id, at, called) => ({
    id,
    label,
    text: true,
    heading: true,
    value: (row) => called(row)?.name?.toLowerCase() ?? null,
    cell: (row) => (at(row) ? h("a", { href: featureLink(at(row)) }, named(called(row))) : "–"),
  });
  /** The same where names are in too many files to sort by them. */
  const readNameColumn = (label, id, at) => ({
    id,
    label,
    cell: (row) => {
      if (!at(row)) return "–";
      const link = h("a", { href: featureLink(at(row)) }, h("span", { class: "quiet" }, "…"));
      return lazily(link, async () => named(await loadFeature(at(row))));
    },
  });
  const plainColumn = (id, label, title, values, write) => (
    { id, label, title, value: (row) => values[row], cell: (row) => write(values[row]) }
  );
  const picturesColumn = (id, at) => ({
    id,
    label: "Strongest samples",
    cell: (row) => (at(row) && current.query.get("pictures") !== "no" ? strip(at(row), 3) : null),
  });
  const numberColumn = (id, label, feature) => (
    { id, label, rising: true, value: feature, cell: (row) => (feature(row) < 0 ? "–" : String(feature(row))) }
  );

  async function layerView(parts) {
    if (parts.length !== 4) throw new NotFound("This address is not complete.");
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
      picturesColumn("pictures", here),
      plainColumn("strength", "S", "S: summed activation", table.strength, size),
      plainColumn("density", "Density", "Share of samples above zero", table.density, percent),
      plainColumn("score", "Name z", "How far the name’s words stand out (z)", table.score, fixed),
      plainColumn("auc", "Name AUC", "How well the name tells unseen samples apart (chance is 0.5)", table.auc, fixed),
      ...others.map(
        (name) => plainColumn(
          `rho:${name}`,
          `ρ ${name}`,
          `Best correlation in any layer of ${name}`,
          table.best[name].rho,
          rho,
        ),
      ),
      ...rankings.map(
        (name) => plainColumn(
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
        number("S to", "s-to"),
        number("Density from, %", "from"),
        number("Density to, %", "to"),
        ...(others.length ? [
          number("ρ from", "rho"),
          number("ρ to", "rho-to"),
          control("ρ with", "with", {}, [["", "any member"], ...others.map((name) => [name, name])]),
        ] : []),
        ...(rankings.length ? [
          number("Δ from", "delta"),
          number("Δ to", "delta-to"),
          control("Δ in", "ranking", {}, [["", "any ranking"], ...rankings.map((name) => [name, name])]),
        ] : []),
        control("Named only", "named", { type: "checkbox", value: "yes" }),
        picturesBox(),
      ],
      keep: (query) => {
        const matches = searching(query);
        const limits = (...keys) => keys.map((key) => limit(query, key));
        const [strength, density] = [limits("s", "s-to"), limits("from", "to").map((share) => share && share / 100)];
        const [rhos, deltas] = [limits("rho", "rho-to"), limits("delta", "delta-to")];
        // A choice that is none of those there are means any, as the control shows.
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
        h(
          "p",
          { class: "note" },
          "S is the summed activation of a feature, density the share of samples on which it is above zero. Name z and " +
            "AUC judge the name and not the feature. ρ is the best correlation with any feature of a member, in any of " +
            "its layers; the best of many is above 0 by chance too.",
        ),
        ...list.nodes,
      ],
      update: list.update,
    };
  }

  // One feature -----------------------------------------------------------------------------------------------------

  function match(at, name, best) {
    const { rho: value, layer, feature } = best;
    const other = memberNamed(name);
    const head = [h("h3", {}, name), h("p", { class: "quiet" }, `${other.modality}, ${other.kind}`)];
    if (layer < 0) return h("li", { class: "match" }, head, h("p", {}, "No match: nothing correlates."));
    const there = { ...at, member: name, layer, feature };
    const label = h("span", { class: "name" });
    const samples = lazily(h("div", { class: "samples" }), async () => {
      const found = await loadFeature(there);
      const { top, tokens } = found;
      label.replaceChildren(named(found));
      const most = Math.max(0, ...(tokens ?? []).flatMap((entry) => entry?.values ?? []));
      const shown = await Promise.all(top.slice(0, 3).map(([sample]) => loadSample(at.dataset, sample)));
      return shown.map((sample, at) => specimen(sample, top[at][1], tokens?.[at] ? tokenText(tokens[at], most) : null));
    });
    return h(
      "li",
      { class: "match" },
      head,
      h("p", {}, h("span", { class: "large" }, "ρ ", rho(value))),
      h(
        "p",
        { class: "where" },
        h("a", { href: featureLink(there) }, `Layer ${layer}, feature ${feature}`),
        " ",
        label,
      ),
      samples,
    );
  }

  function facts(pairs) {
    return h(
      "dl",
      { class: "facts" },
      pairs.map(([term, ...values]) => h("div", {}, h("dt", {}, term), h("dd", {}, values))),
    );
  }

  async function featureView(parts) {
    if (parts.length !== 5) throw new NotFound("This address is not complete.");
    const at = place(parts);
    const member = memberNamed(at.member);
    const n = at.feature;
    const [table, feature] = await Promise.all([loadTable(at), loadFeature(at)]);
    const called = calledIn(table, n);
    const rank = table.strength.filter((strength) => strength > table.strength[n]).length + 1;
    const others = othersOf(table);
    const mostToken = Math.max(0, ...(feature.tokens ?? []).flatMap((entry) => entry?.values ?? []));
    const specimens = (list, aligned) =>
      Promise.all(
        list.map(async ([sample, value], place) => {
          const tokens = aligned ? feature.tokens?.[place] : null;
          return specimen(await loadSample(at.dataset, sample), value, tokens ? tokenText(tokens, mostToken) : null);
        }),
      );
    const samples = h("div", { class: "samples" });
    await fill(samples, () => specimens(feature.top, true));
    const bands = feature.bands.filter((band) => band.samples.length);

    const overlay = control("Where it fires", "overlay", { type: "checkbox", value: "yes" });
    const key = h("div", { class: "key", hidden: true });
    async function drawOverlay() {
      if (!feature.mapped) return;
      const on = current.query.get("overlay") === "yes";
      const maps = on ? await loadMaps(at) : [];
      if (on !== (current?.query.get("overlay") === "yes")) return;
      const most = Math.max(0, ...maps.map((map) => map?.max ?? 0));
      key.hidden = !on;
      key.replaceChildren(legend({ low: 0, high: most }, "how strongly it fires", size));
      samples.classList.toggle("overlaid", on);
      samples.querySelectorAll(".picture").forEach((frame, at) => {
        frame.querySelector("canvas")?.remove();
        if (maps[at] && frame.querySelector("img")) frame.append(heat(maps[at], most));
      });
    }
    const deltas = Object.entries(table.delta).filter(([, values]) => values[n] !== null);
    const step = (to, text, rel) =>
      to >= 0 && to < member.features[at.sae]
        ? h("a", { href: featureLink({ ...at, feature: to }), rel }, text)
        : h("span", { class: "quiet" }, text);

    return {
      title: `Feature ${n} of ${at.member}, layer ${at.layer}`,
      at,
      crumbs: [crumb(at), [`Feature ${n}`, featureLink(at)]],
      nodes: [
        h(
          "p",
          { class: "called" },
          named(called),
          called.name === null && called.candidate ? h("span", { class: "quiet" }, ", which is no clear name") : "",
          table.by_command ? h("span", { class: "quiet" }, ", named by a command") : "",
        ),
        h(
          "nav",
          { class: "steps", "aria-label": "Neighbouring features" },
          step(n - 1, "← Previous", "prev"),
          step(n + 1, "Next →", "next"),
        ),
        facts([
          ["Name z", fixed(table.score[n])],
          ["Name AUC", fixed(table.auc[n])],
          [
            "S",
            size(table.strength[n]),
            h("span", { class: "quiet" }, ` rank ${whole(rank)} of ${whole(table.strength.length)}`),
          ],
          ["Density", percent(table.density[n])],
          ...deltas.map(([ranking, values]) => {
            const entry = study.sharedness.find(
              (other) => other.name === ranking && other.dataset === at.dataset && other.sae === at.sae,
            );
            return ["Δ ", entry ? h("a", { href: rankingLink(entry) }, ranking) : ranking, ` ${size(values[n])}`];
          }),
        ]),
        h(
          "section",
          {},
          h("h2", {}, "Strongest samples"),
          h(
            "p",
            { class: "note" },
            feature.top.length
              ? member.modality === "text"
                ? "The encoder read the captions alone: pictures are what goes with them."
                : "The encoder saw the pictures alone: captions, and names made of them, are what goes with them."
              : "This feature was never active on these samples.",
          ),
          feature.mapped ? h("div", { class: "toggle" }, overlay.node, key) : [],
          samples,
        ),
        bands.length
          ? h(
              "section",
              {},
              h("h2", {}, "Weaker samples"),
              h(
                "p",
                { class: "note" },
                "The strongest samples alone mislead: they show a feature at its clearest. Where these show something else, do not trust its name.",
              ),
              bands.map((band) => {
                const box = lazily(h("div", { class: "samples band" }), () => specimens(band.samples, false));
                return [
                  h("h3", {}, `Around the ${Math.round(100 * band.at)}th percentile of its activations above zero`),
                  box,
                ];
              }).flat(),
            )
          : "",
        feature.histogram?.counts.some(Boolean) ? h(
          "section",
          {},
          h("h2", {}, "Activations"),
          histogram(feature.histogram),
        ) : "",
        others.length
          ? h(
              "section",
              {},
              h("h2", {}, "Best match in every other member"),
              h("p", { class: "note" }, "In any of its layers. The best of many correlations is above 0 by chance too."),
              h(
                "ul",
                { class: "matches" },
                others.map(
                  (other) => match(
                    at,
                    other,
                    {
                      rho: table.best[other].rho[n],
                      layer: table.best[other].layer[n],
                      feature: table.best[other].feature[n],
                    },
                  ),
                ),
              ),
            )
          : "",
      ],
      update(query) {
        overlay.sync(query);
        drawOverlay().catch((error) => {
          if (!(error instanceof FileError)) throw error;
          key.hidden = false;
          key.replaceChildren(h("span", { class: "error" }, error.message));
        });
      },
    };
  }

  // Two layers ------------------------------------------------------------------------------------------------------

  /** The best matches of a layer's features in a layer of another member, or in any, and the layers there are. */
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
    if (parts.length !== 6) throw new NotFound("This address is not complete.");
    const [dataset, sae, ...rest] = parts;
    const a = place([dataset, sae, rest[0], rest[1]]);
    const b = rest[3] === ANY
      ? { dataset, sae, member: memberNamed(rest[2]).name, layer: ANY }
      : place([dataset, sae, rest[2], rest[3]]);
    const any = b.layer === ANY;
    const pairs = study.layerwise
      .filter((entry) => entry.dataset === dataset && entry.sae === sae)
      .flatMap((entry) => entry.pairs)
      .filter((pair) => [pair.a, pair.b].includes(a.member) && [pair.a, pair.b].includes(b.member));
    const pair = pairs.find((entry) => entry.a === a.member && entry.b === b.member);
    const [wmppc, floor] = [pair?.wmppc, pair?.floor].map(
      (cells) => cells?.[pair.layers_a.indexOf(a.layer)]?.[pair.layers_b.indexOf(b.layer)],
    );
    const { layers, strength, names, theirs, rho: values, at } = await bestMatches(a, b, pairs);
    const here = (row) => ({ ...a, feature: row });
    const there = any ? `${b.member}, any layer` : `${b.member} layer ${b.layer}`;
    const list = listing({
      caption: `Features of ${a.member} layer ${a.layer} with their best match in ${there}`,
      columns: [
        plainColumn("rho", "ρ", "Correlation with the best match", values, rho),
        numberColumn("feature", a.member, (row) => row),
        nameColumn("Name", "name", here, names),
        picturesColumn("pictures", here),
        plainColumn("strength", "S", "S: summed activation", strength, size),
        ...(any ? [numberColumn("layer", "Layer", (row) => at(row)?.layer ?? -1)] : []),
        numberColumn("match", b.member, (row) => at(row)?.feature ?? -1),
        any
          ? readNameColumn("Name of the match", "match-name", at)
          : { ...nameColumn("Name of the match", "match-name", at, theirs), heading: false },
        picturesColumn("match-pictures", at),
      ],
      count: values.length,
      sorted: "-rho",
      unit: "feature",
      controls: [
        search("Name or number"),
        number("ρ from", "least"),
        number("ρ to", "most"),
        number("S from", "s"),
        control(any ? "Named only" : "Both named", "named", { type: "checkbox", value: "yes" }),
        picturesBox(),
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
    return {
      title: `${a.member} layer ${a.layer} → ${there}`,
      at: a,
      crumbs: [crumb(a), [`to ${there}`, pairLink(a, a.member, a.layer, b.member, b.layer)]],
      nodes: [
        h(
          "p",
          { class: "lead" },
          `Each feature of ${a.member}, layer ${a.layer}, with the one of ${there} that it correlates with best.`,
          wmppc === undefined || wmppc === null ? "" : ` wMPPC ${fixed(wmppc)}${byChance(floor)}.`,
        ),
        layerLinks(
          `Layer of ${a.member}`,
          memberNamed(a.member).layers,
          a.layer,
          (layer) => pairLink(a, a.member, layer, b.member, b.layer),
        ),
        layerLinks(
          `Layer of ${b.member}`,
          layers,
          b.layer,
          (layer) => pairLink(a, a.member, a.layer, b.member, layer),
        ),
        h(
          "p",
          {},
          h("a", { href: pairLink(a, b.member, any ? last : b.layer, a.member, any ? ANY : a.layer) }, "The other direction"),
          " · ",
          h("a", { href: tableLink(a) }, `All of ${a.member}, layer ${a.layer}`),
          any ? [] : [" · ", h("a", { href: tableLink(b) }, `All of ${b.member}, layer ${b.layer}`)],
        ),
        ...list.nodes,
      ],
      update: list.update,
    };
  }

  // A ranking -------------------------------------------------------------------------------------------------------

  function scatter(ranking, at, called) {
    const side = 320;
    const x = (value) => Math.min(Math.max(value, 0), 1) * side;
    const points = ranking.features.map((_, row) => [ranking.rho_h[row], ranking.rho_g[row]]);
    const dots = (from, to) =>
      points
        .slice(from, to)
        .filter(([h, g]) => h !== null && g !== null)
        .map(([h, g]) => `M${x(h).toFixed(1)} ${(side - x(g)).toFixed(1)}h0`)
        .join("");
    const said = h("p", { class: "quiet said" }, "Point at a dot to see its feature; a click opens it.");
    const spot = svg("circle", { class: "spot", r: 5, visibility: "hidden" });
    const ticks = [0, 0.5, 1].flatMap((value) => [
      svg("text", { x: x(value), y: side + 16, "text-anchor": "middle" }, String(value)),
      svg("text", { x: -8, y: side - x(value) + 4, "text-anchor": "end" }, String(value)),
    ]);
    const label =
      `Scatter of ${plural(points.length, "feature")}: how well the group that shares finds it (ρ G, upwards) against ` +
      `the other group (ρ H, to the right). The table below has every number.`;
    const drawing = svg(
      "svg",
      {
        viewBox: `-44 -10 ${side + 60} ${side + 50}`,
        role: "img",
        "aria-label": label,
      },
      svg("path", { class: "axes", d: `M0 0V${side}H${side}M0 ${side}L${side} 0` }),
      ...ticks,
      svg("text", { x: side / 2, y: side + 34, "text-anchor": "middle" }, "ρ H: those that should not share it"),
      svg(
        "text",
        { transform: `translate(-32 ${side / 2}) rotate(-90)`, "text-anchor": "middle" },
        "ρ G: those that should",
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
    return h("figure", { class: "scatter" }, drawing, said);
  }

  /** The first features, each under that of its words which most of them have. */
  function typology(names) {
    const count = new Map();
    const split = names.map((name) => [...new Set((name ?? "").toLowerCase().split(/\s*,\s*/).filter(Boolean))]);
    for (const word of split.flat()) count.set(word, (count.get(word) ?? 0) + 1);
    const groups = new Map();
    split.forEach((list, row) => {
      const word = list.sort((a, b) => count.get(b) - count.get(a) || (a < b ? -1 : 1))[0] ?? null;
      groups.set(word, [...(groups.get(word) ?? []), row]);
    });
    return [...groups].sort(([a, x], [b, y]) => (a === null) - (b === null) || y.length - x.length || (a < b ? -1 : 1));
  }

  function overlaps(ranking) {
    const related = study.overlaps.filter(
      (entry) => entry.dataset === ranking.dataset && entry.sae === ranking.sae && [
        entry.first,
        entry.second,
      ].includes(ranking.name),
    );
    if (!related.length) return "";
    const top = ranking.features.slice(0, ranking.top);
    return h(
      "section",
      {},
      h("h2", {}, "Overlap with other rankings"),
      h(
        "div",
        { class: "scroll" },
        h(
          "table",
          { class: "listing" },
          h(
            "thead",
            {},
            h(
              "tr",
              {},
              ["Ranking", "Top", "In both", "By chance", "p", "Features"].map(
                (label, at) => h("th", { scope: "col", class: at % 5 ? "number" : null }, label),
              ),
            ),
          ),
          h(
            "tbody",
            {},
            related.map((entry) => {
              const name = entry.first === ranking.name ? entry.second : entry.first;
              const other = study.sharedness.find(
                (one) => one.name === name && one.dataset === ranking.dataset && one.sae === ranking.sae,
              );
              const theirs = new Set(
                other && other.source === ranking.source && other.layer === ranking.layer ? other.features.slice(
                  0,
                  other.top,
                ) : [],
              );
              const both = top.filter((feature) => theirs.has(feature));
              const at = { ...ranking, member: ranking.source };
              return h(
                "tr",
                {},
                h("th", { scope: "row" }, other ? h("a", { href: rankingLink(other) }, name) : name),
                [
                  whole(entry.top),
                  whole(entry.overlap),
                  size(entry.expected),
                  probability(entry.log10_p),
                ].map((text) => h("td", { class: "number" }, text)),
                h(
                  "td",
                  {},
                  both.flatMap((feature) => [h("a", { href: featureLink({ ...at, feature }) }, String(feature)), " "]),
                ),
              );
            }),
          ),
        ),
      ),
    );
  }

  async function rankingView(parts) {
    if (parts.length !== 3) throw new NotFound("This address is not complete.");
    const [dataset, sae, name] = parts;
    const ranking = found(
      study.sharedness.find((entry) => entry.dataset === dataset && entry.sae === sae && entry.name === name),
      `There is no ranking “${plain(name)}”.`,
    );
    const at = { dataset, sae, member: ranking.source, layer: ranking.layer };
    const table = await loadTable(at);
    const feature = (row) => ranking.features[row];
    const here = (row) => ({ ...at, feature: feature(row) });
    const called = (row) => calledIn(table, feature(row));
    const list = listing({
      caption: `Features of ${at.member}, layer ${at.layer}, ranked by ${name}`,
      columns: [
        {
          id: "rank",
          label: "Rank",
          rising: true,
          value: (row) => row + 1,
          cell: (row) => [row < ranking.top ? h("span", { class: "badge" }, "top 1%") : "", ` ${whole(row + 1)}`],
        },
        numberColumn("feature", "Feature", feature),
        nameColumn("Name", "name", here, called),
        picturesColumn("pictures", here),
        plainColumn("delta", "Δ", "Comparative Sharedness: S (ρ G² − ρ H²)", ranking.delta, size),
        plainColumn("rho_g", "ρ G", "The least best correlation among those that should share it", ranking.rho_g, rho),
        plainColumn("rho_h", "ρ H", "The largest best correlation among those that should not", ranking.rho_h, rho),
      ],
      count: ranking.features.length,
      sorted: "+rank",
      unit: "feature",
      controls: [
        search("Name or number"),
        control("Top 1% only", "top", { type: "checkbox", value: "yes" }),
        control("Named only", "named", { type: "checkbox", value: "yes" }),
        picturesBox(),
      ],
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
    const [shared, others] = [ranking.shared_with, ranking.not_shared_with].map((members) => members.join(", "));
    return {
      title: `Ranking ${name}`,
      at,
      crumbs: [crumb(at), [`Ranking ${name}`, rankingLink(ranking)]],
      nodes: [
        h(
          "p",
          { class: "lead" },
          `Features of ${at.member}, layer ${at.layer}, by how much more they are shared with ${shared} than with ${others}.`,
        ),
        h(
          "p",
          { class: "note" },
          "Δ = S (ρ G² − ρ H²), by matches between last layers: ρ G is the least best correlation in the first group, " +
            "ρ H the largest in the second. Other layers may have better ones.",
        ),
        h(
          "div",
          { class: "beside" },
          h("section", {}, h("h2", {}, "Both groups"), scatter(ranking, at, called)),
          h(
            "section",
            {},
            h("h2", {}, "Top 1% by topic"),
            h(
              "p",
              { class: "quiet" },
              `The top ${plural(ranking.top, "feature")}, under the most frequent word of the name.`,
            ),
            h(
              "div",
              { class: "types" },
              groups.map(([word, rows]) =>
                h(
                  "details",
                  {},
                  h(
                    "summary",
                    {},
                    named({ name: word }),
                    h("span", { class: "tally" }, String(rows.length)),
                    h(
                      "span",
                      { class: "meter", "aria-hidden": "true" },
                      h("span", { style: { width: `${(100 * rows.length) / most}%` } }),
                    ),
                  ),
                  h(
                    "ul",
                    {},
                    rows.map(
                      (row) => h(
                        "li",
                        {},
                        h("a", { href: featureLink({ ...at, feature: top[row] }) }, `${top[row]} `, named(called(row))),
                      ),
                    ),
                  ),
                ),
              ),
            ),
          ),
        ),
        overlaps(ranking),
        h("section", {}, h("h2", {}, "Ranking"), list.nodes),
      ],
      update: list.update,
    };
  }

  // The page --------------------------------------------------------------------------------------------------------

  const VIEWS = { "": overview, layer: layerView, feature: featureView, pair: pairView, ranking: rankingView };
  const scrolled = new Map();
  let entry = null; // of the browser's history: the one that is shown
  let entries = 0;
  let turn = 0;

  const newEntry = () => `${Date.now()}-${entries++}`;

  function remember(move) {
    scrolled.set(entry, window.scrollY);
    move();
    entry = history.state?.entry ?? null;
  }

  async function build(path, query) {
    try {
      let parts;
      try {
        parts = path.split("/").slice(1).map(decodeURIComponent);
      } catch {
        throw new NotFound("This address cannot be read.");
      }
      const [kind, ...rest] = parts;
      if (!Object.hasOwn(VIEWS, kind ?? "") || (!kind && rest.length)) throw new NotFound("There is no such page.");
      study ??= await load("study");
      const view = await VIEWS[kind ?? ""](rest, query);
      return view;
    } catch (error) {
      const home = h("p", {}, h("a", { href: "#/" }, "Back to the overview"));
      if (error instanceof NotFound)
        return { title: "Not found", crumbs: [], nodes: [h("p", {}, error.message), home], update() {} };
      if (!(error instanceof FileError)) throw error;
      return {
        title: error.title,
        crumbs: [],
        nodes: [
          h("p", { class: "error" }, error.message),
          h(
            "p",
            {},
            "These pages need all files of their folder, as they were made. Copy the whole folder, or run the study again.",
          ),
          home,
        ],
        update() {},
      };
    }
  }

  async function show(first) {
    const [path, search] = `${location.hash.slice(1) || "/"}`.split(/\?(.*)/s);
    const query = new URLSearchParams(search ?? "");
    const returning = history.state?.entry ?? null;
    if (!returning) history.replaceState({ entry: newEntry() }, "");
    entry = history.state.entry;
    if (current?.path === path) {
      turn++;
      current.query = query;
      return current.update(query);
    }
    const mine = ++turn;
    const main = document.getElementById("main");
    current = null;
    typed = {};
    watcher.disconnect();
    main.setAttribute("aria-busy", "true");
    const view = await build(path, query);
    if (mine !== turn) return;
    const heading = h("h1", { tabindex: "-1" }, view.heading ?? view.title);
    main.replaceChildren(heading, ...view.nodes.flat().filter(Boolean));
    main.removeAttribute("aria-busy");
    document.title = `${view.title} – ${study?.study ?? "concept pages"}`;
    current = { path, query, update: view.update };
    view.update(query);
    header(view);
    if (!first) heading.focus({ preventScroll: true });
    if (scrolled.has(returning)) {
      // The page has to be as long as it was before it can be where it was.
      const waiting = [...main.querySelectorAll(".samples")].filter((element) => element.whenSeen);
      await Promise.all(waiting.map((element) => watcher.unobserve(element) ?? fill(element, element.whenSeen)));
      if (mine !== turn) return;
    }
    window.scrollTo(0, scrolled.get(returning) ?? 0);
  }

  let jumpTo = () => {};

  function header(view) {
    const links = [[study?.study ?? "Overview", "#/"], ...view.crumbs];
    document.getElementById("crumbs").replaceChildren(
      ...links.map(
        ([text, href], at) => h(
          "li",
          {},
          h(
            "a",
            { href, "aria-current": at === links.length - 1 && current.path === href.slice(1) ? "page" : null },
            text,
          ),
        ),
      ),
    );
    if (study) jumpTo(view.at);
  }

  function jumpBox() {
    const form = document.getElementById("jump");
    const sets = study.datasets.flatMap(({ name }) => study.saes.map((sae) => ({ dataset: name, sae })));
    const option = (value, text) => h("option", { value }, text);
    const set = h(
      "select",
      { "aria-label": "Data set and SAE setting" },
      sets.map(({ dataset, sae }, at) => option(at, `${dataset}, ${sae}`)),
    );
    const member = h("select", { "aria-label": "Member" }, study.members.map(({ name }) => option(name, name)));
    const layer = h("select", { "aria-label": "Layer" });
    const feature = h(
      "input",
      { type: "number", min: 0, required: true, "aria-label": "Feature number", placeholder: "feature" },
    );
    const layers = () => {
      const chosen = memberNamed(member.value);
      const before = layer.value;
      layer.replaceChildren(...chosen.layers.map((number) => option(number, `layer ${number}`)));
      if (chosen.layers.includes(Number(before)) && before) layer.value = before;
      feature.max = chosen.features[(sets[set.value] ?? sets[0]).sae] - 1;
    };
    member.addEventListener("change", layers);
    set.addEventListener("change", layers);
    form.replaceChildren(...(sets.length > 1 ? [set] : []), member, layer, feature, h("button", {}, "Go"));
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      location.hash = featureLink(
        { ...sets[set.value], member: member.value, layer: layer.value, feature: Number(feature.value) },
      );
    });
    jumpTo = (at) => {
      if (!at) return;
      set.value = sets.findIndex(({ dataset, sae }) => dataset === at.dataset && sae === at.sae);
      member.value = at.member;
      layers();
      layer.value = at.layer;
      feature.value = at.feature ?? "";
    };
    layers();
  }

  // A page from file:// may have no storage, and reading the name alone can throw.
  const storage = (use) => {
    try {
      return use(window.localStorage);
    } catch {
      return null;
    }
  };
  const preferred = window.matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (document.documentElement.dataset.theme ?? (preferred.matches ? "dark" : "light")) === "dark";
  const remembered = storage((store) => store.getItem("conceptshare-theme"));
  if (["dark", "light"].includes(remembered)) document.documentElement.dataset.theme = remembered;

  document.addEventListener("DOMContentLoaded", async () => {
    history.scrollRestoration = "manual";
    const theme = document.getElementById("theme");
    const pressed = () => theme.setAttribute("aria-pressed", String(dark()));
    theme.addEventListener("click", () => {
      document.documentElement.dataset.theme = dark() ? "light" : "dark";
      storage((store) => store.setItem("conceptshare-theme", document.documentElement.dataset.theme));
      pressed();
    });
    preferred.addEventListener("change", pressed);
    pressed();
    document.getElementById("skip").addEventListener("click", (event) => {
      event.preventDefault();
      (document.querySelector("h1") ?? document.getElementById("main")).focus();
    });
    window.addEventListener("hashchange", () => {
      scrolled.set(entry, window.scrollY);
      show(false);
    });
    study = await load("study").catch(() => null);
    if (study) jumpBox();
    show(true);
  });
})();
