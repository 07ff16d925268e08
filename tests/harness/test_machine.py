"""What a report says of the machine."""

import platform

from dsdistill.harness import machine


def test_processor_cores_memory_and_system(monkeypatch, tmp_path):
    cpus = tmp_path / "cpuinfo"
    cpus.write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\nflags\t: fpu\n")
    monkeypatch.setattr(machine, "_CPUS", cpus)
    name, cores, size, system = machine.describe().split(", ")
    assert name == "Some CPU @ 3 GHz"
    assert int(cores.split()[0]) >= 1
    assert size.split()[1] in {"MiB", "GiB", "TiB"}
    assert system == f"{platform.system()} {platform.machine()}"


def test_accelerators_come_last():
    assert machine.describe(["Some GPU"]) == f"{machine.describe()}, Some GPU"


def test_without_a_list_of_processors(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "_CPUS", tmp_path / "none")
    monkeypatch.setattr(platform, "processor", lambda: "")
    assert machine.describe().startswith("unknown processor, ")
