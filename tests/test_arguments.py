"""What a command line and config files ask for: layers, sections, --help, --print_config, and the run that it is."""

import dataclasses
import os
import re
from pathlib import Path

import pytest
import yaml
from support.runs import call, refused

from arguments import parse
from common import UserError
from methods import METHODS
from run_utils import run_identity
from settings import LENGTHS, Settings, option

DTD = ("--dataset", "dtd", "--root_path", "data")
CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Write a config file and parse it, with flags."""
    monkeypatch.chdir(tmp_path)

    def parsed(text: str, *flags):
        Path("c.yaml").write_text(text)
        return parse(["--config", "c.yaml", *map(str, flags)])

    return parsed


def run_id(*flags, images: int = 0) -> str:
    """Return the id of the run that these flags ask for, on this many training images or as many as digits has."""
    parsed = parse([*map(str, flags), "--device", "cpu"])
    return run_identity(parsed, images or 10 * parsed.settings.shots)


# --- layers


def test_settings_come_in_layers(config):
    released = parse(DTD)
    assert (released.settings.backbone, released.settings.seed, released.settings.shots) == ("ViT-B/16", 3, 1)
    assert (released.hparams.lr, released.hparams.n_iters, released.hparams.density_ratio) == (2e-4, 2000, 5e-5)
    assert (released.hparams.batch_size, released.hparams.t, released.hparams.early_stop_loss) == (32, 5, 0.01)
    assert parse((*DTD, "--s", "0.999")).hparams.density_ratio == 1e-3
    assert parse([]).settings.backbone == parse(["--dataset", "digits"]).settings.backbone == "tiny"
    text = "lr: 3e-4\ntotal_iters: 70\nshots: 4\ns: 0.9\n"
    layered = config(text, *DTD, "--shots", 2)
    assert (layered.settings.shots, layered.hparams.lr, layered.hparams.density_ratio) == (2, 3e-4, 0.1)
    assert layered.hparams.settled(2, 94).total_iters == 70
    assert config(text, *DTD, "--n_iters", 5).hparams.settled(4, 188).total_iters == 20
    assert config(text, *DTD, "--epochs", 3).hparams.settled(4, 188).total_iters == 18
    assert config(text, *DTD, "--density_ratio", 0.5).hparams.density_ratio == 0.5
    for frozen in (layered, layered.settings, layered.hparams):
        with pytest.raises(AttributeError):
            frozen.lr = 1.0


def test_sections_are_for_a_method_a_number_of_shots_and_a_dataset(config):
    text = """
        lr: 1e-4
        methods:
          so: {lr: 2e-4, s: 0.9}
          lora:
            rank: 7
            by_shots: {4: {rank: 8}}
        by_shots:
          2: {lr: 3e-4}
        datasets:
          dtd:
            t: 9
            lr: 4e-4
            methods:
              so: {lr: 5e-4}
    """
    assert config(text).hparams.lr == config(text, "--shots", 1).hparams.lr == 2e-4  # a method's own beat the general
    assert config(text, "--shots", 2).hparams.lr == 3e-4  # those for the shots beat these
    so, lora = config(text, *DTD), config(text, *DTD, "--method", "lora")  # those for the dataset beat all
    assert (so.hparams.lr, so.hparams.t, so.hparams.density_ratio) == (5e-4, 9, 0.1)
    assert (lora.hparams.lr, lora.hparams.rank) == (4e-4, 7)
    assert config(text, *DTD, "--method", "lora", "--shots", 4).hparams.rank == 8
    assert config(text, *DTD, "--shots", 2, "--lr", 6e-4).hparams.lr == 6e-4
    assert so.by_data.keys() == {"lr", "t"} and lora.by_data.keys() == {"lr", "rank"}  # whichever is chosen
    assert config(text, "--method", "lora", "--shots", 1).by_data == lora.by_data
    assert config(text, *DTD, "--lr", 6e-4).by_data.keys() == {"t"}
    assert config("datasets: {dtd: {s: 0.9, epochs: 1}}").by_data.keys() == {"density_ratio", *LENGTHS}


def test_settings_by_data_are_named_with_what_the_file_says_of_them(config, tmp_path):
    text = "by_shots: {1: {lr: 0.5, prompts: specific}}\n"
    said = config(text).by_data
    assert said.keys() == {"lr", "prompts", "template"} and len({*said.values()}) == 1
    for same in ("workers: 0\n", "t: 7\n", "methods: {lora: {by_shots: {1: {lr: 0.1}}}}\n", "search: {t: [1, 2]}\n"):
        assert config(text + same).by_data == said
    for other in ("lr: 0.1\n", "datasets: {dtd: {lr: 0.1}}\n", "methods: {so: {prompts: released}}\n"):
        changed = config(text + other).by_data
        assert changed.keys() == said.keys() and not {*changed.values()} & {*said.values()}
    assert config(text, "--template", "a {}.").by_data.keys() == {"lr"}
    path = tmp_path / os.fsdecode(b"a b;\n\xff.yaml")
    path.write_text(text)
    assert parse(["--config", str(path)]).by_data["lr"].partition(" ")[0] == "a_b___.yaml"


@pytest.mark.parametrize("search", ["2024-01-01", "{lr: [2024-01-01]}", "{1: [1], lr: [1]}"])
def test_odd_values_of_a_search_are_a_mistake(config, search):
    with pytest.raises(UserError, match="search"):
        config(f"search: {search}\n")


@pytest.mark.parametrize(
    "text, where",
    [
        ("methods: 7\n", "methods"),
        ("methods:\n  sso: {lr: 1}\n", "methods"),
        ("methods:\n  so: 7\n", "methods: so"),
        ("datasets:\n  cifar: {lr: 1}\n", "datasets"),
        ("by_shots:\n  few: {lr: 1}\n", "by_shots"),
        ("datasets:\n  digits: {method: lora}\n", "datasets: digits"),  # the section was chosen for another method
        ("datasets:\n  digits: {shots: 4}\n", "datasets: digits"),
        ("methods:\n  so:\n    datasets:\n      digits: {dataset: dtd}\n", "methods: so: datasets: digits"),
    ],
)
def test_sections_that_mean_nothing_are_rejected(config, text, where):
    with pytest.raises(UserError) as caught:
        config(text)
    assert f"--config c.yaml: {where}" in str(caught.value)


def test_values_published_for_a_method_lie_between_defaults_and_files(config, tmp_path, monkeypatch):
    monkeypatch.setattr(METHODS["adam"], "__file__", str(tmp_path / "adam.py"))
    (tmp_path / "adam.yaml").write_text("lr: 7e-4\nby_shots:\n  2: {n_iters: 500}\ndatasets:\n  dtd: {batch_size: 8}\n")
    adam = ("--method", "adam", *DTD, "--shots", "2")
    hparams = parse(adam).hparams
    assert (hparams.lr, hparams.n_iters, hparams.batch_size, hparams.early_stop_loss) == (7e-4, 500, 8, 0.01)
    assert parse((*adam, "--shots", "1")).hparams.n_iters == 2000
    assert config("lr: 1e-4\n", *adam).hparams.lr == 1e-4
    assert parse((*adam, "--total_iters", "9")).hparams.settled(2, 94).total_iters == 9
    assert parse(["--method", "adam"]).hparams.lr == 3e-5  # configs/digits.yaml
    assert parse(("--method", "so", *DTD)).hparams.lr == 2e-4


def test_shipped_configs_say_what_they_promise():
    for path in (*CONFIGS.glob("*.yaml"), *CONFIGS.glob("ablations/*.yaml")):
        parse(["--config", str(path), *DTD])
    released, paper = (parse(["--config", str(CONFIGS / f"so_{name}.yaml"), *DTD]) for name in ("released", "paper"))
    assert released == parse(DTD)
    assert (paper.hparams.density_ratio, paper.hparams.t, paper.hparams.total_iters) == (5e-4, 10, 2000)


# --- flags of one method


def test_help_shows_one_methods_flags_in_groups():
    code, _, out, _ = call(parse, "--method", "lora", "--help")
    assert code == 0
    parts = re.split(r"^(\w+):$", out, flags=re.MULTILINE)
    flags = {
        name: set(re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)) for name, text in zip(parts[1::2], parts[2::2])
    }
    assert list(flags) == ["data", "model", "method", "training", "machine", "output"]
    assert flags["method"] == {"method", "encoder", "position", "rank", "alpha", "dropout", "lora_on"}
    assert {"lr", "epochs", "search"} < flags["training"] and {"config", "help"} < flags["output"]
    shown = set.union(*flags.values())
    assert Settings.__dataclass_fields__.keys() < shown and not {"density_ratio", "s", "t"} & shown


@pytest.mark.parametrize(
    "argv, owners",
    [
        (["--method", "lora", "--density_ratio", "0.1"], "so, shira, so_ablation"),
        (["--method", "lora", "--s", "0.1"], "so, shira, so_ablation"),
        (["--rank", "4"], "lora, relora, dora, adalora"),
        (["--method", "zero_shot", "--probe_c", "1"], "linear_probe"),
    ],
)
def test_a_flag_of_other_methods_is_rejected_and_names_them(run_main, argv, owners):
    line = refused(run_main(*argv))
    assert argv[-2] in line and f"only {owners}" in line


# --- files that the program writes


def test_print_config_is_a_config_file_that_says_where_each_value_is_from(run_main):
    Path("mine.yaml").write_text("methods:\n  so: {t: 7}\n")
    flags = ("--config", "mine.yaml", "--shots", 4, "--template", "a {}.", "--s", 0.9, "--search", "lr=1e-3,2e-3")
    code, _, out, _ = run_main(*flags, "--print_config")
    assert code == 0 and sorted(path.name for path in Path(".").iterdir()) == ["mine.yaml"]
    sources = dict(re.findall(r"^(\w+):.*  # (.*)$", out, flags=re.MULTILINE))
    values = yaml.safe_load(out)
    assert sources.keys() == values.keys() and values["shots"] == 4
    expected = {"t": "--config mine.yaml, methods: so", "shots": "command line", "density_ratio": "command line"}
    expected |= {"backbone": "configs/digits.yaml", "lr": "configs/digits.yaml, methods: so", "search": "command line"}
    expected |= {"batch_size": "default of so", "seed": "default", "template": "command line"}
    assert expected.items() <= sources.items()
    Path("printed.yaml").write_text(out)
    assert run_id("--config", "printed.yaml") == run_id(*flags)


def test_a_config_file_of_earlier_versions_is_the_same_run(config, capsys):
    text = """
        {method: so, dataset: digits, root_path: '', shots: 1, seed: 3, backbone: tiny, encoder: both, position: all,
        lr: 0.001, total_iters: 2, batch_size: 32, early_stop_loss: 0.01, density_ratio: 0.0005, t: 5, prune_first:
        false, sampled_gradients: true, gradient: random, moments: importance, support: dynamic, rank: 2, alpha: 1.0,
        dropout: 0.25, lora_on: 'q,k,v', merge_every: 125, probe_c: 0.316, probe_iters: 1000, text_init: false,
        tip_alpha: 1.0, tip_beta: 5.5, cache_passes: 10, prolip_lambda: 1.0, search: {}, tuned_on: val, draw:
        released, split: null, classes: all, prompts: released, template: [], min_area: 0.6, flip: false, device: cpu,
        precision: fp32, workers: 0, image_cache_mb: 2048, cache_dir: c, results_dir: r, save_path: w, filename: null,
        eval_only: false, eval_datasets: null, eval_every: 0, save_every: 1000, tensorboard: false}
    """
    assert run_identity(config(text), 10) == "so_digits_tiny_1shot_seed3_9c65c2b4"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: --config c.yaml") and all(word in line for word in ("gradient", "rank", "tip_beta"))
    assert "density_ratio" not in line


# --- the identity of a run

# Taken from the program as it was before methods owned their settings: results of that time are found now.
IDS = {
    "": "so_digits_tiny_16shot_seed3_ed9cda29",
    "--shots 2 --n_iters 3": "so_digits_tiny_2shot_seed3_4d41c4a7",
    "--shots 2 --total_iters 6": "so_digits_tiny_2shot_seed3_4d41c4a7",
    "--epochs 3": "so_digits_tiny_16shot_seed3_48ebc1cb",
    "--shots 4 --s 0.9 --lr 1e-3 --encoder text --position top1 --prune_first --no-sampled_gradients --n_iters 7": (
        "so_digits_tiny_4shot_seed3_9d9a7a49"
    ),
    "--search lr=1e-3,1e-4 --search t=3,5": "so_digits_tiny_16shot_seed3_6a0fb589",
    "--method so_ablation --gradient importance": "so_ablation_digits_tiny_16shot_seed3_48c2a599",
    "--method adam --precision bf16 --prompts specific": "adam_digits_tiny_16shot_seed3_d9f4bc7d",
    "--method lora --rank 4 --lora_on q,v --seed 9": "lora_digits_tiny_16shot_seed9_2f72839e",
    "--method relora": "relora_digits_tiny_16shot_seed3_907c12c9",
    "--method dora": "dora_digits_tiny_16shot_seed3_b14057de",
    "--method adalora": "adalora_digits_tiny_16shot_seed3_33f31f67",
    "--method prolip": "prolip_digits_tiny_16shot_seed3_5563657f",
    "--method linear_probe --text_init": "linear_probe_digits_tiny_16shot_seed3_92b274f6",
    "--method tip_adapter": "tip_adapter_digits_tiny_16shot_seed3_6ec1ba3f",
    "--method tip_adapter_f --shots 4": "tip_adapter_f_digits_tiny_4shot_seed3_ce37971f",
    "--method zero_shot": "zero_shot_digits_tiny_16shot_seed3_6e027fd1",
    "--draw coop --tuned_on test --classes base --template a_{}": "so_digits-base_tiny_16shot_seed3_825759c5",
    "--dataset dtd --root_path data --shots 4": "so_dtd_ViT-B-16_4shot_seed3_5c2119e0",
    "--dataset dtd --root_path data --shots 4 --method lora": "lora_dtd_ViT-B-16_4shot_seed3_d554ed8b",
}


@pytest.mark.parametrize("flags", IDS)
def test_runs_have_the_ids_that_they_always_had(flags):
    assert run_id(*flags.split()) == IDS[flags]


CHANGES = {  # flags that change the outcome
    **{"shots": 2, "seed": 4, "backbone": "RN50", "prompts": "specific", "precision": "bf16", "draw": "coop"},
    **{"test_part": "val", "classes": "base", "template": "a {}.", "tuned_on": "test", "method": "adam"},
    **{"lr": 1.5e-4, "n_iters": 7, "batch_size": 16, "early_stop_loss": 0.02, "min_area": 0.5, "flip": None},
    **{"eval_every": 5, "density_ratio": 1e-4, "t": 6, "prune_first": None, "no-sampled_gradients": None},
    **{"encoder": "text", "position": "up"},
}
PLACES = {  # flags that do not
    **{"workers": 3, "image_cache_mb": 1, "cache_dir": "c", "results_dir": "r", "save_path": "s", "filename": "f"},
    **{"force": None, "wait": None, "save_every": 9, "root_path": "d", "tensorboard": None},
}


def test_what_changes_the_outcome_and_only_that_changes_the_run_id():
    def with_flag(name, value):
        return run_id(f"--{name}", *([] if value is None else [value]), images=160)

    base = run_id(images=160)
    ids = [with_flag(*change) for change in CHANGES.items()]
    assert len({base, *ids}) == len(ids) + 1
    assert {with_flag(*place) for place in PLACES.items()} == {base}
    assert run_id(*DTD, images=47) == run_id("--dataset", "dtd", "--root_path", "elsewhere", images=47)


def test_the_grid_of_a_search_is_part_of_the_run_id():
    def searched(*words, **values):
        flags = [word for name, value in values.items() for word in (f"--{name}", value)]
        return run_id(*flags, *(word for grid in words for word in ("--search", grid)))

    grids = [(), ("lr=1e-3",), ("lr=1e-3,1e-4",), ("lr=1e-4,1e-3",), ("lr=1e-3,1e-4", "t=5"), ("t=5", "lr=1e-3,1e-4")]
    assert len({searched(*grid) for grid in grids}) == len(grids)
    assert searched("lr=1e-3,1e-4", lr=7.0) == searched("lr=1e-3,1e-4")  # it is searched
    assert searched("lr=1e-3,1e-4", t=9) != searched("lr=1e-3,1e-4")


# --- values at the edge


def test_the_largest_seed():
    assert parse(["--seed", str(2**63 - 1)]).settings.seed == 2**63 - 1
    for seed in (2**63, -1):
        with pytest.raises(UserError, match="--seed"):
            parse(["--seed", str(seed)])


def test_null_in_a_config_file_is_rejected_where_it_has_no_meaning(config):
    optional = {"n_iters", "total_iters", "epochs", "workers", "save_path", "filename", "split", "eval_datasets"}
    optional |= {"white_level", "arch", "train_dir", "val_dir", "test_dir", "classnames", "image_root"}
    names = {field.name for kind in (Settings, METHODS["so"].Hparams) for field in dataclasses.fields(kind)} | {"s"}
    for name in names - optional:
        with pytest.raises(UserError, match=f"{name} must be .*not None"):
            config(f"{name}: null\n")
    nulls = config("".join(f"{name}: null\n" for name in optional))
    assert nulls == parse([])  # it leaves the number of iterations to the other layers
    assert config("total_iters: 5\nepochs: null\n").hparams.settled(1, 10).total_iters == 5


def test_what_is_printed_is_the_same_run_whatever_its_texts_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "a folder: with blanks, and a name - that is # much longer than eighty characters" / "images"
    root.mkdir(parents=True)
    flags = ("--method", "coop", "--dataset", "dtd", "--root_path", str(root), "--ctx_init", "a photo of a " * 9)
    Path("printed.yaml").write_text(call(parse, *flags, "--print_config")[2], encoding="utf-8")
    assert parse(["--config", "printed.yaml"]) == parse(flags)


def test_the_deeper_section_wins(config):
    text = "methods: {so: {datasets: {digits: {t: 7}}}}\ndatasets: {digits: {t: 9, lr: 0.5}}\n"
    assert (config(text).hparams.t, config(text).hparams.lr) == (7, 0.5)


def test_methods_may_have_a_flag_of_one_name_in_different_types(monkeypatch, config):
    @dataclasses.dataclass(frozen=True)
    class Odd(METHODS["adam"].Hparams):
        support: int = option(1, "so_ablation has a word of that name")
        views: float = option(0.5, "gda has a whole number of that name")

    monkeypatch.setattr(METHODS["adam"], "Hparams", Odd)
    for odd in (
        parse(["--method", "adam", "--support", "3", "--views", "0.25"]),
        config("method: adam\nsupport: 3\nviews: 0.25\n"),
    ):
        assert (odd.hparams.support, odd.hparams.views) == (3, 0.25)
    assert parse(["--method", "gda", "--views", "2"]).hparams.views == 2
    with pytest.raises(UserError, match="--views"):
        parse(["--method", "gda", "--views", "0.25"])


def test_shots_for_one_method_choose_its_values_for_shots(config):
    text = "methods: {so: {shots: 4}}\nby_shots: {4: {lr: 0.5}, 16: {lr: 0.25}}\n"
    assert (config(text).settings.shots, config(text).hparams.lr) == (4, 0.5)
    assert config(text, "--shots", 16).hparams.lr == 0.25
    assert config(text, "--method", "adam").settings.shots == 16  # of configs/digits.yaml
