"""What a run says: which metrics the terminal shows, and which the file gets."""

import json
import time

from common.train.log import Log, Speed


def test_the_terminal_shows_what_is_asked_for_and_the_file_gets_all(tmp_path, capsys):
    tracked = []
    log = Log("rl", tmp_path, True, lambda metrics, step: tracked.append((step, metrics)))
    metrics = {"score": 0.5, "kl": 2, "entropy": 0.1}
    log.log(3, metrics, shown=["kl", "absent", "score"])
    log.log(4, metrics)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "rl     3  kl 2  score 0.5"
    assert second == "rl     4  score 0.5  kl 2  entropy 0.1"
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 3, **metrics}, {"step": 4, **metrics}]
    assert tracked == [(3, metrics), (4, metrics)]
    assert log.last == metrics


def test_other_processes_are_silent(tmp_path, capsys):
    log = Log("rl", tmp_path, False)
    log.log(1, {"score": 1})
    log.log_samples(1, [{"prompt": "Hi"}])
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())
    assert log.last == {"score": 1}


def test_speed_leaves_out_what_came_before_a_restart(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    speed = Speed()
    speed.add(1000)
    now[0] = 5.0
    speed.restart()
    for _ in range(2):
        speed.add(30)
        now[0] += 2.0
    assert speed.lap() == 15.0
    speed.add(10)
    now[0] += 1.0
    assert speed.lap() == 10.0
