"""A made-up site of concept pages: the browser's files come from the library, the data from a seed."""

import base64
import json
import zlib

import numpy as np
from PIL import Image

from conceptshare.pages._index import write_frame

DATASET, SAE = "shapes", "small"
LAYERS = [0, 3, 5]
FEATURES = 130
SAMPLES = 510  # two files of captions
BLOCK = 64
WORDS = ["red", "square", "cat", "night", "tree", "boat", "round", "hand", "old map", "snow"]
MEMBERS = [
    ("seer@0", "seer", "image", "vision"),
    ("seer-clip@1", "seer-clip", "image", "vlm"),
    ("reader@0", "reader", "text", "language"),
    ("reader-clip@1", "reader-clip", "text", "vlm"),
]
NAMES = [member for member, *_ in MEMBERS]
# sides of thumbnails, in turn: wide, tall, square
SIZES = [(160, 80), (60, 160), (120, 120)]
HOSTILE = [
    '<img src=x onerror="window.pwned = 1">',
    "</script><script>window.pwned = 2</script>",
    "\"'`><svg onload=window.pwned=3>",
    "line\u2028separator\u2029paragraph",
    "\u202egnol dna desrever\u202c \u2066isolated",
    "bell\u0007 escape\u001b tab\t null\u0000 end",
    "Donaudampfschifffahrts" * 12,
    "👩‍👩‍👧‍👦 🏳️‍🌈 مرحبا שלום 漢字",
    "{{constructor.constructor('window.pwned = 4')()}} javascript:window.pwned=5",
    "",
]
NEVER_ACTIVE = 7
MISSING_THUMBNAIL, UNRENDERED = 11, 12


def write(folder, key, value):
    """One data file."""
    packed = base64.b64encode(zlib.compress(json.dumps(value, allow_nan=False).encode())).decode()
    path = folder / f"{key}.js"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'conceptshare.add({json.dumps(key)}, "{packed}");\n', encoding="ascii")


def rounded(values):
    return np.round(np.asarray(values, float), 4).tolist()


def layer_key(member, layer):
    return f"data/{DATASET}/{SAE}/{member}/layer-{layer:02d}"


def make_table(rng, member, others, features, layers, rankings):
    names = [", ".join(rng.choice(WORDS, rng.integers(1, 3), replace=False)) for _ in range(features)]
    named = rng.random(features) < 0.8
    named[: len(HOSTILE)] = True
    names[: len(HOSTILE)] = HOSTILE
    return {
        "fvu": 0.85 if member == "reader@0" else 0.5,
        "strength": rounded(rng.gamma(0.6, 200, features)),
        "density": rounded(rng.beta(0.5, 12, features)),
        "name": [name if known else None for name, known in zip(names, named, strict=True)],
        "candidate": [f"perhaps-{n}" if not known and n % 2 else None for n, known in enumerate(named)],
        "score": [
            value if known else None for value, known in zip(rounded(rng.gamma(4, 2, features)), named, strict=True)
        ],
        "auc": [
            value if known else None for value, known in zip(rounded(rng.uniform(0.5, 1, features)), named, strict=True)
        ],
        "best": {
            other: {
                "rho": rounded(rng.beta(2, 3, features)),
                "layer": [
                    -1 if n == NEVER_ACTIVE else int(layer) for n, layer in enumerate(rng.choice(layers, features))
                ],
                "feature": rng.integers(0, features, features).tolist(),
            }
            for other in sorted(others)  # in another order than the study's
        },
        "delta": {name: rounded(rng.normal(0, 40, features)) for name in rankings},
    }


def make_map(rng, place):
    """A map that is active only in its lower left cell, with a box inside, beyond or equal to the image."""
    rows, columns = 4, 5
    values = np.zeros((rows, columns), np.uint8)
    values[-1, 0] = 255
    box = [[0.25, 0, 0.75, 1], [0, 0.25, 1, 0.75], [-0.5, 0, 1.5, 1], [0, 0, 1, 1]][place % 4]
    return {
        "box": box,
        "rows": rows,
        "columns": columns,
        "max": round(float(rng.uniform(1, 2)), 3),
        "values": base64.b64encode(values.tobytes()).decode(),
    }


def make_details(rng, modality, first, table, captions):
    """The content of a file of details, and of the file of maps next to it."""
    features, maps = [], []
    block = slice(first, first + BLOCK)
    for number, (name, candidate) in enumerate(
        zip(table["name"][block], table["candidate"][block], strict=True), first
    ):
        called = {"name": name, "candidate": candidate}
        if number == NEVER_ACTIVE:
            silent = {"max": 0, "counts": [0] * 20}
            features.append(called | {"top": [], "bands": [], "histogram": silent, "mapped": False})
            maps.append([])
            continue
        samples = rng.permutation(SAMPLES)[:21]
        if number == 0:  # hostile texts, every shape, and missing values
            samples = np.arange(21)
        values = np.sort(rng.gamma(2, 1, 21))[::-1]
        pairs = [[int(sample), round(float(value), 3)] for sample, value in zip(samples, values, strict=True)]
        feature = {
            **called,
            "top": pairs[:9],
            "bands": [
                {"at": at, "samples": pairs[9 + 4 * band : 13 + 4 * band]} for band, at in enumerate((0.9, 0.5, 0.1))
            ],
            "histogram": {
                "max": round(float(values[0]), 3),
                "counts": np.sort(rng.poisson(8 * np.exp(-np.arange(20) / 4)))[::-1].tolist(),
            },
        }
        feature["mapped"] = modality == "image" and number != 2
        maps.append([make_map(rng, place) if feature["mapped"] and place < 8 else None for place in range(9)])
        if modality == "text" and number != 2:
            feature["tokens"] = []
            for place, (sample, _) in enumerate(pairs[:9]):
                # The last piece continues the previous word; the first blank is a separate piece.
                one, *others = captions[sample].split(" ")
                text = ["[CLS]", " ", one, *(f" {word}" for word in others), "[SEP]"]
                strengths = rounded(
                    np.where(np.arange(len(text)) == 2, 2.0, rng.random(len(text)) * (rng.random(len(text)) < 0.4))
                )
                feature["tokens"].append(None if place == 8 else {"text": text, "values": strengths})
        features.append(feature)
    return {"first": first, "features": features}, {"first": first, "maps": maps}


def write_details(folder, key, first, details, maps):
    for kind, value in (("", details), ("maps-", maps)):
        write(folder, f"{key}/{kind}{first // BLOCK:03d}", value | {"first": first})


def write_samples(rng, folder):
    captions = [
        HOSTILE[n]
        if n < len(HOSTILE)
        else f"a {rng.choice(WORDS)} with a {rng.choice(WORDS)} under the {rng.choice(WORDS)}"
        for n in range(SAMPLES)
    ]
    sizes = [None if n == UNRENDERED else list(SIZES[n % 3]) for n in range(SAMPLES)]
    for start in range(0, SAMPLES, 500):
        block = f"{start // 500:03d}"
        key = f"samples/{DATASET}/{block}"
        write(folder, key, {"captions": captions[start : start + 500], "sizes": sizes[start : start + 500]})
        (folder / key).mkdir()
        for n in range(start, min(start + 500, SAMPLES)):
            if n in (MISSING_THUMBNAIL, UNRENDERED):
                continue
            width, height = SIZES[n % 3]
            across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
            hue = rng.uniform(40, 255, 3)
            disc = ((across - rng.uniform(0.2, 0.8)) ** 2 + (down - rng.uniform(0.2, 0.8)) ** 2) < 0.05
            picture = np.where(disc[..., None], 255 - hue, hue * (0.6 + 0.4 * down[..., None]))
            Image.fromarray(picture.astype(np.uint8)).save(folder / key / f"{n:06d}.webp", quality=60, method=0)
    return captions


def ranking(rng, strength, rho_g, name, shared_with, not_shared_with):
    rho_h = rng.beta(2, 3, FEATURES)

    def ranked(g, h):
        delta = strength * (g**2 - h**2)
        order = np.argsort(-delta)
        columns = {"delta": delta, "rho_g": g, "rho_h": h, "share": np.linspace(0, 1, FEATURES) ** 2}
        topics = [] if g is rho_g else [{"word": "flag", "features": 4, "top_share": 0.5, "share": 0.02, "q": 0.003}]
        return {
            "features": order.tolist(),
            "topics": topics,
            **{name: rounded(values[order]) for name, values in columns.items()},
        }

    return {
        "dataset": DATASET,
        "sae": SAE,
        "name": name,
        "source": "seer-clip@1",
        "layer": 5,
        "shared_with": shared_with,
        "not_shared_with": not_shared_with,
        **ranked(rho_g, rho_h),
        "calibrated": ranked(np.maximum(0, rho_g - 0.2), np.maximum(0, rho_h - 0.4)),
        "top": 10,
    }


def member_entry(name, encoder, modality, kind, layers, features):
    entry = {"name": name, "encoder": encoder, "seed": int(name[-1]), "modality": modality, "kind": kind}
    return entry | {"layers": layers, "features": {SAE: features}}


def square(rng, size):
    return [[None if a == b else round(float(rng.uniform(0.05, 0.6)), 3) for b in range(size)] for a in range(size)]


def write_site(folder, seed=0):
    """A study of two image and two text members, three layers of 130 features.

    Args:
        folder: Is made.
        seed: Of everything.

    Returns:
        The study, as in ``study.js``.
    """
    rng = np.random.default_rng(seed)
    write_frame(folder)
    captions = write_samples(rng, folder)
    strength, rho_g = rng.gamma(1, 100, FEATURES), rng.beta(3, 2, FEATURES)
    rankings = [
        ranking(rng, strength, rho_g, "shared-with-text", ["reader@0", "reader-clip@1"], ["seer@0"]),
        ranking(rng, strength, rho_g, "shared-with-vlms", ["reader-clip@1"], ["seer@0", "reader@0"]),
    ]
    both = set(rankings[0]["features"][:10]) & set(rankings[1]["features"][:10])
    calibrated = set.intersection(*(set(one["calibrated"]["features"][:10]) for one in rankings[:2]))
    pairs = [("seer@0", "reader@0"), ("seer-clip@1", "reader-clip@1")]
    study = {
        "study": "made-up",
        "version": "0.1.0",
        "commit": "0123456789abcdef",
        "datasets": [{"name": DATASET, "samples": SAMPLES}],
        "saes": [SAE],
        "codes": ["before_topk"],
        "unexplained_layers": "mark",
        "max_fvu_global": {SAE: 0.8},
        "members": [member_entry(*member, LAYERS, FEATURES) for member in MEMBERS],
        "matrices": [
            {
                "dataset": DATASET,
                "sae": SAE,
                "name": "everything",
                "members": NAMES,
                "wmppc": {reading: square(rng, 4) for reading in ("pooled", "layer_mean", "last")},
                "excess": {
                    reading: square(np.random.default_rng(7), 4) for reading in ("pooled", "layer_mean", "last")
                },
                "null": {reading: [[0.05] * 4] * 3 + [[0.125] * 4] for reading in ("pooled", "layer_mean", "last")},
                "p": {reading: [[0.04] * 4] * 3 + [[0.5] * 4] for reading in ("pooled", "layer_mean", "last")},
                "unexplained": {reading: [[0] * 4] * 3 + [[2] * 4] for reading in ("pooled", "layer_mean", "last")},
                "left_out": {reading: [[0] * 4] * 4 for reading in ("pooled", "layer_mean", "last")},
            }
        ],
        "layerwise": [
            {
                "dataset": DATASET,
                "sae": SAE,
                "name": "depth",
                "pairs": [
                    {
                        "a": a,
                        "b": b,
                        "layers_a": LAYERS,
                        "layers_b": LAYERS,
                        "wmppc": rounded(rng.uniform(0.1, 0.5, (3, 3))),
                        "excess": [[0.25, 0.13, 0.06]] * 3,
                        "null": [[0.07] * 3] * 3,
                        "p": [[0.04] * 3] * 3,
                        "unexplained": [[0, 0, 1]] * 3,
                    }
                    for a, b in pairs
                ],
            }
        ],
        "sharedness": rankings,
        "samples": [
            {
                "dataset": DATASET,
                "sae": SAE,
                "name": "captions",
                "image": "seer@0",
                "image_layers": [5],
                "text": "reader@0",
                "text_layers": [3, 5],
                "unexplained": {"seer@0": [], "reader@0": [3]},
                "worst": [[n, -2.5 + n / 4] for n in range(6)],
                "best": [[n, 7.25 - n / 4] for n in range(6, 12)],
            }
        ],
        "overlaps": [
            {
                "dataset": DATASET,
                "sae": SAE,
                "first": "shared-with-text",
                "second": "shared-with-vlms",
                "top": 10,
                "overlap": len(both),
                "expected": 100 / FEATURES,
                "log10_p": -4.3,
                "calibrated_overlap": len(calibrated),
                "calibrated_log10_p": -1.3,
            }
        ],
    }
    write(folder, "study", study)
    for member, _, modality, _ in MEMBERS:
        others = [name for name in NAMES if name != member]
        for layer in LAYERS:
            ranked = [entry["name"] for entry in rankings] if (member, layer) == ("seer-clip@1", 5) else []
            table = make_table(rng, member, others, FEATURES, LAYERS, ranked)
            write(folder, layer_key(member, layer), table)
            for first in range(0, FEATURES, BLOCK):
                details, maps = make_details(rng, modality, first, table, captions)
                write_details(folder, layer_key(member, layer), first, details, maps)
        for first in range(0, SAMPLES, 500):
            chunk = range(first, min(first + 500, SAMPLES))
            fired = [[[(sample + n) % FEATURES, n] for n in range(3)] if sample else [] for sample in chunk]
            write(folder, f"data/{DATASET}/{SAE}/{member}/samples/{first // 500:03d}", fired)
        write(folder, f"data/{DATASET}/{SAE}/{member}/samples", [1 + n % 9 for n in range(FEATURES)])
    for a, b in [*pairs, *((b, a) for a, b in pairs)]:
        for layer in LAYERS:
            match = rng.integers(0, FEATURES, (3, FEATURES))
            match[:, NEVER_ACTIVE] = -1
            rho = rng.beta(2, 3, (3, FEATURES))
            rho[:, NEVER_ACTIVE] = 0
            key = f"data/{DATASET}/{SAE}/pairs/{a}__{b}/layer-{layer:02d}"
            write(folder, key, {"target": b, "layers": LAYERS, "rho": rounded(rho), "match": match.tolist()})
    return study


def write_large_site(folder, features=8192, others=9, seed=1):
    """One layer with many features and best matches in nine other members; every block has the same details.

    Members have names of up to 70 letters.
    """
    rng = np.random.default_rng(seed)
    write_frame(folder)
    captions = write_samples(rng, folder)
    names = [f"member{'-of-a-long-name' * (number % 5)}-{number}@0" for number in range(others + 1)]
    study = {"study": "large", "version": "0.1.0", "commit": None, "datasets": [{"name": DATASET, "samples": SAMPLES}]}
    study |= {
        "saes": [SAE],
        "codes": ["before_topk"],
        "unexplained_layers": "mark",
        "max_fvu_global": {SAE: 0.8},
        "layerwise": [],
        "sharedness": [],
        "samples": [],
        "overlaps": [],
    }
    matrix = {"dataset": DATASET, "sae": SAE, "name": "everything", "members": names}
    nothing = {column: {"pooled": [[None]]} for column in ("excess", "null", "p", "unexplained", "left_out")}
    study["matrices"] = [matrix | {"wmppc": {"pooled": square(rng, others + 1)}, **nothing}]
    study["members"] = [member_entry(name, name[:-2], "image", "vision", [0], features) for name in names]
    write(folder, "study", study)
    table = make_table(rng, names[0], names[1:], features, [0], [])
    write(folder, layer_key(names[0], 0), table)
    details, maps = make_details(rng, "image", 0, table, captions)
    for first in range(0, features, BLOCK):
        write_details(folder, layer_key(names[0], 0), first, details, maps)
    return table
