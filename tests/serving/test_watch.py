"""A file in the folder of bundles names what is served; what it names wrongly changes nothing."""

import json
import shutil
import time

import pytest

from onerec_hf.serving import create_app, save_bundle
from onerec_hf.serving.bundles import with_catalogue
from onerec_hf.serving.watch import CURRENT

from .served import client, recommender


def until(condition):
    """Waits for what the watcher does in its time; a minute is for a machine that is busy."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def publish(folder, name):
    (folder / "new").write_text(f"{name}\n", encoding="utf-8")
    (folder / "new").rename(folder / CURRENT)


@pytest.mark.parametrize("swaps", [True, False])
def test_the_service_follows_the_file(tmp_path, swaps):
    own = recommender()
    fewer = with_catalogue(own, own.model.catalogue.without_items(range(1010, 1020)))
    for name, one in (("all", own), ("fewer", fewer), ("broken", fewer)):
        save_bundle(one, tmp_path / name)
    (tmp_path / "broken" / "bundle.json").write_text(json.dumps({"fingerprint": "0"}), encoding="utf-8")
    with client(own, bundles=tmp_path, watch_s=0.02, swaps=swaps) as http:

        def served():
            return http.get("/info").json()["catalogue"]

        def refused():
            return 'onerec_swaps_total{kind="catalogue",outcome="refused"}' in http.get("/metrics").text

        publish(tmp_path, "fewer")
        until(lambda: served()["catalogue"] == "fewer")
        assert served()["num_items"] == 55 and not refused()
        publish(tmp_path, "broken")
        until(refused)
        assert served()["name"] == "fewer"
        publish(tmp_path, "all")
        until(lambda: served()["num_items"] == 65)
        publish(tmp_path, "fewer")  # once more: a version of that name is kept
        until(lambda: served()["num_items"] == 55)
        assert served()["name"] == "fewer.2"
        publish(tmp_path, "../elsewhere")
        shutil.rmtree(tmp_path / "broken")
        time.sleep(0.1)
        (tmp_path / CURRENT).unlink()
        assert served()["name"] == "fewer.2" and http.get("/health").status_code == 200


@pytest.mark.parametrize("arguments", [{"watch_s": 1.0}, {"watch_s": 0.0, "bundles": "."}])
def test_what_cannot_be_watched(arguments):
    with pytest.raises(ValueError, match="seconds above 0, and a folder to watch"):
        create_app(recommender(), **arguments)
