"""The loader: host facts → choice → bytes → verified files → a running ``llama-server``.

It runs alone from the root of a Space and imports nothing of the farm. To be read in this order:

1. what it works with: ``errors``, ``settings``, ``manifest``, ``locations``, ``events``, ``notes``
2. what to run here: ``host`` (``facts/``), ``select``, ``suppose``
3. bytes: ``trust`` and ``channel``, ``fetch`` (``transfer/``)
4. files: ``unpack`` and ``foreign`` (``archive/``), ``installation``, ``store`` (``storage/``)
5. a server: ``prepare``, ``devices``, ``model``, ``server`` (``serving/``), ``supervisor``,
   ``launch``, ``test_run``, ``client``
6. what a person sees: ``doctor``, ``report``, ``console``, ``timeline``, ``interrupts`` and
   ``__main__``

Import its modules by name; this file stays empty so that ``python -m llama_loader --help`` costs
nothing. Which of them may know which is a contract in the project's ``pyproject.toml``.
"""
