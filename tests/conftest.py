import pytest, pathlib
@pytest.fixture(scope="session")
def shared():
    root = pathlib.Path(__file__).resolve().parents[2] / "shared"
    def find(name):
        p = root / name
        if not p.exists(): pytest.skip(f"{name} absent")
        return p
    return find
