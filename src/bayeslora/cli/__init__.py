"""The commands: `bayeslora train | evaluate | predict | compare | export | plan | demo`.

`main.py` parses and dispatches without importing torch. Each command is one module, imported when it runs.
"""
