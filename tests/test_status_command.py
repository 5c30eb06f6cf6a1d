"""`status`: of a server that is none of ours, and in words."""

from __future__ import annotations

import http.server
import json
import threading

import pytest

from comfy_xdit import cli, status
from comfy_xdit.nodes import report

TOLD = {"version": "1", "groups": [], "changes": ["a sentence."]}
ANSWERS = {
    status.PATH: TOLD | {"report": report.words(TOLD)},
    status.QUEUE: {"queue_running": [["x"]], "queue_pending": [["y"], ["z"]]},
}


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        found = ANSWERS.get(self.path)
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def url():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_in_words_and_as_json(url, capsys, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # is not asked
    assert cli.main(["status", "--url", url]) == cli.DONE
    assert capsys.readouterr().out.splitlines() == [
        "1 running, 2 waiting in the queue",
        "comfy_xdit 1",
        "no rank runs; the first xDiT loader starts them",
        "this ComfyUI differs from those known: a sentence.",
    ]
    assert cli.main(["status", "--url", f"{url}/", "--json"]) == cli.DONE
    assert json.loads(capsys.readouterr().out)["queue"] == {"running": 1, "waiting": 2}


def test_a_server_without_the_pack_is_named(url, capsys, monkeypatch):
    monkeypatch.delitem(ANSWERS, status.PATH)
    assert cli.main(["status", "--url", url]) == cli.INVALID
    assert "answers /xdit/status with 404" in capsys.readouterr().err
