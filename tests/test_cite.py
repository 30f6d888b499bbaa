"""The BibTeX of what a config uses."""

import re

import pytest
import yaml

from sglight import cite
from sglight.cite import entries, main
from tests.conftest import ROOT

# Overrides, and keys that they alone bring about.
USES = {
    "strategy=backprop model=resnet": {"haber2017", "kingma2015"},
    "strategy=backprop strategy.stages=2 model=leapfrog": {"haber2017", "kingma2015", "narayanan2021"},
    "strategy=pvd model=antisymmetric strategy.optimizer.name=sgd": {"haber2017", "ferris1994"},
    "strategy=dni model=hamiltonian strategy.optimizer.name=adamw": {
        "haber2017", "chang2018reversible", "jaderberg2017", "loshchilov2019",
    },
    "strategy=delayed model=leapfrog strategy.backward=rebuilt strategy.optimizer.name=nadam": {
        "haber2017", "huo2018decoupled", "narayanan2019", "narayanan2021", "rivaud2025", "dozat2016", "ajanthan2025",
    },
    "strategy=delayed model=resnet strategy.backward=replayed": {
        "haber2017", "huo2018decoupled", "narayanan2019", "narayanan2021", "huo2018replay", "kingma2015",
    },
    "strategy=dni model=resnet strategy.estimator.form=sobolev": {
        "haber2017", "jaderberg2017", "czarnecki2017", "kingma2015",
    },
    "strategy=local model=resnet strategy.head.loss=predsim": {
        "haber2017", "belilovsky2020", "nokland2019", "kingma2015",
    },
    "strategy=blend model=resnet": {"haber2017", "jaderberg2017", "belilovsky2020", "kingma2015"},
    "strategy=blend model=resnet strategy.arrival=late strategy.head.loss=predsim": {
        "haber2017", "jaderberg2017", "huo2018decoupled", "narayanan2019", "belilovsky2020", "nokland2019",
        "kingma2015",
    },
    "strategy=blend model=resnet strategy.source=synthetic": {"haber2017", "jaderberg2017", "kingma2015"},
    "strategy=multilevel model=resnet strategy.level.mode=[exact,local]": {
        "haber2017", "chang2018multilevel", "belilovsky2020", "kingma2015",
    },
    "strategy=multilevel model=resnet": {
        "haber2017", "chang2018multilevel", "huo2018decoupled", "narayanan2019", "narayanan2021", "kingma2015",
    },
}  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], overrides: str) -> str:
    main(overrides.split())
    return capsys.readouterr().out


@pytest.mark.parametrize("overrides", USES)
def test_what_is_used_is_cited_and_nothing_else(capsys, overrides):
    keys = re.findall(r"^@\w+\{(\w+),", printed(capsys, overrides), re.MULTILINE)
    assert len(keys) == len(set(keys))
    assert set(keys) == USES[overrides] | {"sglight"}


def test_every_entry_is_cited_by_something_and_whole():
    assert set(entries()) == set.union(*USES.values()) | {"sglight"}
    for key, entry in entries().items():
        assert entry.count("{") == entry.count("}"), key
        assert all(f"  {field} = " in entry for field in ("title", "author")), key
        assert key == "sglight" or f"year = {{{re.search('[0-9]{4}', key)[0]}}}" in entry


def test_the_citation_file_names_the_same_papers():
    listed = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for reference in listed["references"]:
        (entry,) = (entry for entry in entries().values() if f"{{{reference['title']}}}" in entry)
        assert f"{{{reference['year']}}}" in entry
        assert all(author["family-names"] in entry for author in reference["authors"])
    assert f"version = {{{listed['version']}}}" in entries()["sglight"]


def test_a_mistake_ends_with_a_sentence():
    with pytest.raises(SystemExit, match=r"error: .*did you mean .*delayed"):
        main(["strategy=delayd"])


def test_help_says_how(capsys):
    assert printed(capsys, "--help").startswith("usage: python -m sglight.cite [group=choice ...]")


def test_papers_belong_to_strategies_of_ours():
    ours = {path.stem for path in (ROOT / "conf" / "strategy").glob("*.yaml")}
    assert ours == {*cite.STRATEGIES, "backprop"}
