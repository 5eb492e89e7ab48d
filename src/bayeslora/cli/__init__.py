"""The commands: `bayeslora inspect | train | evaluate | predict | compare | export | plan | demo` and others.

`main.py` parses and dispatches without importing torch. Each command is one module, imported when it runs.
"""
