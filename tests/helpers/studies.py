"""A study for commands that read one, with members that have no models."""

from conceptshare.config.study import build_study, write_study


def study_file(path, members, **analyses):
    """Write a study's JSON.

    Args:
        path: where.
        members: ``(member, modality, kind)`` of each.
        analyses: as in a config.
    """
    encoders = {}
    for member, modality, kind in members:
        name, _, seed = member.partition("@")
        entry = {"library": "transformers", "model": f"hub/{name}", "modality": modality, "kind": kind}
        entry |= {"layers": 2, "width": 8, "global_token": "first", "seeds": []}
        encoders.setdefault(name, entry)["seeds"].append(int(seed))
    datasets = {"pairs": {"source": "hub/pairs", "split": "all", "image": "image", "caption": "caption"}}
    config = {"study": "made-up", "datasets": datasets, "encoders": encoders, "saes": {"small": {"k": 4}}}
    write_study(build_study(config | {"analyses": analyses}, "test"), path)
    return path
