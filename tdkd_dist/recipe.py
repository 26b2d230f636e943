"""Recipes: how a short YAML file and overrides become a checked `Config`, and back.

A recipe lies in `recipes/`; `base:` names the recipe it extends, or several, of which the later win. A variant, in
`recipes/variants/`, is a part of a recipe that goes over any other: the objectives to compare. Whatever is wrong with
one is a `Mistake` whose message names the key or file.
"""

import csv
import difflib
import itertools
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tdkd_dist.config import Config, StudentConfig, flatten
from tdkd_dist.files import write_text
from tdkd_dist.mistakes import Mistake, Mistakes, require

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
VARIANTS = RECIPES / "variants"
SITES = RECIPES.parent / "launch" / "sites"
ACCURACY = RECIPES.parent / "docs" / "results" / "accuracy.csv"


Layer = tuple[Any, Path | None]
"""A part of a configuration, and the file that it is of."""


def list_recipes() -> dict[str, str]:
    """Every recipe's name, without the variants, with what `docs/results/accuracy.csv` says of its accuracy."""
    with ACCURACY.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths = [path for path in sorted(RECIPES.rglob("*.yaml")) if path.parent != VARIANTS]
    names = [str(path.relative_to(RECIPES).with_suffix("")) for path in paths]
    return {name: _describe_accuracy([row for row in rows if row["recipe"] == name]) for name in names}


def _describe_accuracy(rows: list[dict[str, str]]) -> str:
    """The first measured row in words, or else that there is none, with what is published; "-" is not known."""
    for row in rows:
        if row["kind"] == "measured":
            seeds = "1 seed" if row["seeds"] == "1" else f"{row['seeds']} seeds"
            upto = "" if row["timesteps"] == "1" else f" at t = 1..{row['timesteps']}"
            return f"{row['top1']} % top-1{upto} ({seeds}, {row['hardware']})"
    published = [f"{row['top1'].split()[-1]} % at T = {row['timesteps']}" for row in rows if row["kind"] == "published"]
    return f"not measured; published: {', '.join(published)}" if published else "not measured"


def load_config(recipe: str, overrides: list[str]) -> Config:
    """The checked configuration of `recipe` (a name in `recipes/`, or a YAML file) with `key=value` overrides.

    `variant=NAME` among them names a file in `recipes/variants/` (or a YAML file) that wins over the recipe;
    `site=NAME`, or else the environment's TDKD_SITE, one in `launch/sites/` that wins over both. The other overrides
    win over all.
    Raises `Mistake`, a line for each unknown recipe, variant, site or key, wrong type or bad value.
    """
    from omegaconf import OmegaConf

    path = find_recipe(recipe)
    variant, own = _take("variant", overrides)
    site, own = _take("site", own)
    said_by = "TDKD_SITE" if site is None else "site"
    site = site or os.environ.get("TDKD_SITE")
    files = [*_read_layers(path), *(_read_layers(_find("variant", variant, VARIANTS)) if variant else [])]
    files += [_read_file(_find(said_by, site, SITES))] if site else []
    merged, found = OmegaConf.structured(Config), Mistakes()
    for layer, where in [*files, *((layer, None) for layer in _parse_overrides(own, found))]:
        with found.gathered():
            merged = _merge(merged, layer, where)
    config = _to_config(merged, found)
    if not config.run.name:
        # An evaluation leaves the record of the training that has the recipe's name alone.
        parts = [path.stem, *([Path(variant).stem] if variant else []), *([] if config.train.epochs else ["eval"])]
        config.run = replace(config.run, name="-".join(parts))
    return config


def _take(key: str, overrides: list[str]) -> tuple[str | None, list[str]]:
    """The value that the overrides give to `key`, and those of other keys. Raises `Mistake` for two, and for none."""
    values = [text.partition("=")[2] for text in overrides if text.startswith(f"{key}=")]
    require(len(values) < 2, f"{' '.join(f'{key}={value}' for value in values)}: give one {key}")
    require("" not in values, f"{key}=: name one, or leave it out")
    return values[0] if values else None, [text for text in overrides if not text.startswith(f"{key}=")]


def load_all(members: list[tuple[str, list[str]]]) -> list[Config]:
    """The configurations of a sweep's members. Raises `Mistake` with those of all of them."""
    configs, found = [], Mistakes()
    for recipe, overrides in members:
        with found.gathered():
            configs.append(load_config(recipe, overrides))
    found.tell()
    return configs


def expand_sweep(recipe: str, overrides: list[str]) -> list[tuple[str, list[str]]]:
    """Each member's recipe and overrides of a sweep: every combination of the values in `sweep.KEY=[a,b,...]`.

    `sweep.recipe=[...]` goes through recipes, `sweep.variant=[...]` through variants. The first key changes slowest. A
    member is called after its recipe (or `run.name`) and its values, such as `twce-seed0` or `fashion_sew-mix-seed0`
    of a variant, and lives in `runs/` or in the folder `run.dir`. Without a `sweep.` override there is one member, as
    given. Raises `Mistake` for values that are no list.
    """
    swept = [text.removeprefix("sweep.") for text in overrides if text.startswith("sweep.")]
    if not swept:
        return [(recipe, overrides)]
    common = [text for text in overrides if not text.startswith("sweep.")]
    given = dict(text.partition("=")[::2] for text in common)
    keys, choices = zip(*(_parse_choices(text) for text in swept), strict=True)
    members = []
    for values in itertools.product(*choices):
        chosen = dict(zip(keys, values, strict=True))
        own_recipe = chosen.pop("recipe", recipe)
        parts = [given.get("run.name") or Path(own_recipe).stem, *(_name_value(*item) for item in chosen.items())]
        if "run.name" in given and "recipe" in keys:
            parts.insert(1, Path(own_recipe).stem)
        name = "-".join(parts).replace(os.sep, "_")
        own = [f"{key}={value}" for key, value in chosen.items()] + [f"run.name={name}"]
        if "run.dir" in given:
            own.append(f"run.dir={Path(given['run.dir']) / name}")
        members.append((own_recipe, [*common, *own]))
    return members


def _name_value(key: str, value: str) -> str:
    return Path(value).stem if key == "variant" else f"{key.split('.')[-1]}{value}"


def _parse_choices(text: str) -> tuple[str, list[str]]:
    import yaml

    key, _, value = text.partition("=")
    try:
        values = yaml.safe_load(value)
    except yaml.YAMLError:
        values = None
    require(isinstance(values, list) and len(values) > 0, f"sweep.{text}: a list is wanted, such as sweep.{key}=[1,2]")
    return key, [str(v) if not isinstance(v, bool) else str(v).lower() for v in values]


def parse_student(pairs: list[str]) -> StudentConfig:
    """A recipe's `student:` section of `key=value` texts alone. Raises `Mistake`, a line for each that does not fit."""
    from omegaconf import OmegaConf

    merged, found = OmegaConf.structured(Config), Mistakes()
    for layer in _parse_overrides([f"student.{text}" for text in pairs], found):
        with found.gathered():
            merged = _merge(merged, layer)
    student = _to_section(merged, "student", found)
    found.tell()
    assert isinstance(student, StudentConfig)
    return student


def read_config(path: Path) -> Config:
    """The configuration that `save_config` wrote."""
    from omegaconf import OmegaConf

    return _to_config(_merge(OmegaConf.structured(Config), *_read_file(path)), Mistakes())


def save_config(config: Config, path: Path) -> None:
    """Write the whole resolved configuration as YAML."""
    write_text(path, to_yaml(config))


def to_yaml(config: Config) -> str:
    """The whole resolved configuration, as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def find_recipe(recipe: str) -> Path:
    """The YAML file of a recipe given by name or path; `Mistake` with the nearest names if there is none."""
    if recipe.endswith((".yaml", ".yml")) or os.sep in recipe:
        for path in (Path(recipe), RECIPES / f"{recipe}.yaml"):
            if path.is_file():
                return path
        raise Mistake(f"recipe={recipe}: no such file")
    path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        names = list(list_recipes())
        near = difflib.get_close_matches(recipe, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise Mistake(f"recipe={recipe}: no such recipe; {hint}")
    return path


def _find(kind: str, name: str, folder: Path) -> Path:
    """The file of a variant or site, given by its name in `folder` or by its path; `Mistake` if there is none."""
    for path in (Path(name), folder / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise Mistake(f"{kind}={name}: no such file in {folder.relative_to(RECIPES.parent)}; there are {known}")


def _read_file(path: Path) -> Layer:
    import yaml
    from omegaconf import OmegaConf

    try:
        content = OmegaConf.load(path)
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise Mistake(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    require(OmegaConf.is_dict(content) and len(content) > 0, f"{path}: a recipe is a mapping of sections")
    refuse_interpolations(content, str(path))
    return content, path


def refuse_interpolations(layer: Any, where: str) -> None:
    """Raise `Mistake` for `${...}` in a recipe's or an override's values.

    OmegaConf would put an environment variable, a secret perhaps, into every copy of the configuration.
    """
    from omegaconf import OmegaConf

    def values(node: Any) -> Iterator[Any]:
        if isinstance(node, Mapping):
            node = [*node.keys(), *node.values()]
        if isinstance(node, list):
            for part in node:
                yield from values(part)
        else:
            yield node

    for value in values(OmegaConf.to_container(layer, resolve=False)):
        wrong = isinstance(value, str) and "${" in value
        require(not wrong, f"{where}: ${{...}} is not resolved: write the value itself, or let the shell fill it in")


def _read_layers(path: Path, seen: tuple[Path, ...] = ()) -> list[Layer]:
    from omegaconf import OmegaConf

    require(path not in seen, f"{path}: `base:` leads back to the recipe itself")
    content, _ = _read_file(path)
    base = content.pop("base", None)
    layers = []
    for name in [] if base is None else base if OmegaConf.is_list(base) else [base]:
        local = path.parent / f"{name}.yaml"
        try:
            found = local if local.is_file() else find_recipe(str(name))
        except Mistake as mistake:
            raise Mistake(f"{path}: base: {mistake}") from mistake
        layers += _read_layers(found, (*seen, path))
    return [*layers, (content, path)]


def _parse_overrides(overrides: list[str], found: Mistakes) -> list[Any]:
    """A layer an override, so that one mistake does not hide the others."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    layers = []
    for text in overrides:
        key, equals, _ = text.partition("=")
        with found.gathered():
            require(bool(key and equals), f"{text}: an override is key=value, such as train.epochs=3")
            try:
                layer = OmegaConf.from_dotlist([text])
            except (yaml.YAMLError, OmegaConfBaseException, ValueError, TypeError, RecursionError) as error:
                reason = " ".join(str(error).split())
                raise Mistake(f"{text[:200]}: not readable as YAML: {reason[:200]}; quote the value") from error
            refuse_interpolations(layer, key)
            layers.append(layer)
    return layers


def _merge(schema: Any, layer: Any, where: Path | None = None) -> Any:
    """`schema` with `layer`, of the file `where`, over it. Raises `Mistake`, a line for each key that does not fit."""
    if where is not None:
        try:
            return _merge(schema, layer)
        except Mistake as mistake:
            raise Mistake("\n".join(f"{line} (in {where})" for line in mistake.lines)) from mistake
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    try:
        return OmegaConf.merge(schema, layer)
    except (OmegaConfBaseException, TypeError, ValueError) as error:  # not its own: a mapping where a list belongs
        parts = _apart(layer)
        if len(parts) > 1:
            found = Mistakes()
            for part in parts:
                with found.gathered():
                    _merge(schema, part)
            found.tell()
        if isinstance(error, ConfigKeyError):
            raise Mistake(_unknown_key(error.full_key or str(error.key))) from error
        key = getattr(error, "full_key", None) or ".".join(_first_key(layer)) or "the configuration"
        raise Mistake(_wrong_value(key, error)) from error


def _first_key(layer: Any) -> list[str]:
    for key, value in layer.items():
        return [str(key), *(_first_key(value) if isinstance(value, Mapping) else [])]
    return []


def _apart(layer: Any) -> list[dict[str, Any]]:
    """A layer as one of its own for each section and key."""
    return [
        {section: {key: value}} if isinstance(values, Mapping) else {section: values}
        for section, values in layer.items()
        for key, value in (values.items() if isinstance(values, Mapping) else [("", None)])
    ]


def _to_config(merged: Any, found: Mistakes) -> Config:
    """The checked configuration. Raises `Mistake` with those `found` before and all that are wrong with it."""
    sections = {f.name: _to_section(merged, f.name, found) for f in fields(Config)}
    found.tell()
    config = Config(**sections)
    config.check()
    return config


def _to_section(merged: Any, name: str, found: Mistakes) -> Any:
    """A section of the configuration, None where it has mistakes, which are then `found`."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    with found.gathered():
        try:
            return OmegaConf.to_object(merged[name])
        except OmegaConfBaseException as error:
            raise Mistake(_wrong_value(str(error.full_key), error)) from error
    return None


def _wrong_value(key: str, error: Exception) -> str:
    """What OmegaConf says of a value, where it is about the value, and what the key may be."""
    said = str(error).splitlines()[0]
    told = said if said.startswith(("Value '", "Invalid value '")) and "$VALUE" not in said else "not of its kind"
    return f"{key}: {told}; must be {_kind_of(key)}"


def _kind_of(key: str) -> str:
    """What values a key takes, in words."""
    hint: Any = Config
    for part in key.split("[")[0].split("."):
        hint = get_type_hints(hint).get(part, Any) if is_dataclass(hint) else Any
    return _in_words(hint)


def _in_words(hint: Any) -> str:
    kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    origin, parts = get_origin(hint), get_args(hint)
    if hint in kinds:
        return kinds[hint]
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(_in_words(part) for part in parts))
    if origin is list:
        return "a list, such as [a, b]"
    if origin is tuple:
        return f"a list of {len(parts)} numbers"
    return "a section: keys with their values" if is_dataclass(hint) else "keys with their values"


def _unknown_key(key: str) -> str:
    known = [*flatten(Config()), *(f.name for f in fields(Config))]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not near:
        tails = {k.rsplit(".", 1)[-1]: k for k in known}
        near = [tails[t] for t in difflib.get_close_matches(key.rsplit(".", 1)[-1], list(tails), n=1)]
    return f"{key}: no such key" + (f"; did you mean {near[0]}?" if near else "")
