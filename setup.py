"Give setuptools the requirements in `settings.ini`; everything else about the package is in `pyproject.toml`."
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

config = ConfigParser()
config.read(Path(__file__).with_name("settings.ini"))
needs = config["DEFAULT"]

setup(install_requires=needs["requirements"].split(), extras_require={"dev": needs["dev_requirements"].split(), "bench": needs["bench_requirements"].split()})
