"""What tests download is unpacked once, whole, though several processes of a suite want it at the same time."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from support.downloads import filled_once


def test_whoever_fills_a_folder_at_the_same_time_all_see_it_whole(tmp_path):
    folder, together = tmp_path / "packages" / "one", Barrier(4)

    def fill(name):
        with filled_once(folder) as new:
            together.wait(10)  # all have begun, none has finished
            assert new != folder and not folder.exists()
            for file in "ab":
                (new / file).write_text(name)
            together.wait(10)
        return sorted(p.name for p in folder.iterdir()), {p.read_text() for p in folder.iterdir()}

    with ThreadPoolExecutor(4) as pool:
        seen = list(pool.map(fill, "wxyz"))
    assert all(names == ["a", "b"] and len(writers) == 1 for names, writers in seen)
    assert [p.name for p in folder.parent.iterdir()] == ["one"]
    with filled_once(folder) as new:
        assert new is None


def test_what_was_not_filled_to_the_end_is_not_there(tmp_path):
    with pytest.raises(KeyError), filled_once(tmp_path / "one") as new:
        (new / "a").write_text("")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
