"""The command line: one file a sub-command, and what they share.

main.py                 the program: global options, errors to stderr, exit codes
train.py  resume.py     launch.py: what both do with a run
evaluate.py  sample.py  check.py
settings.py             TOML, options and presets.py, laid over each other -> config.py
data.py  arrays.py      build.py: from a configuration to what the trainer takes
rundir.py               what lies in a run directory
"""
