"""The commands: `bayeslora train | evaluate | predict | compare | export | plan | demo`.

`main.py` parses and dispatches without importing torch; each command is one module, imported when it is asked for.
"""
