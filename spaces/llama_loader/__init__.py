"""The loader: host facts → choice → bytes → verified files → running server.

To be read in this order, each room before what is made of it:

1. what it works with: ``errors``, ``settings``, ``manifest``, ``locations``, ``events``, ``notes``
2. what to run here: ``host`` (``facts/``), ``select``, ``suppose``
3. bytes: ``trust`` and ``channel``, ``fetch`` (``transfer/``)
4. files: ``unpack`` and ``foreign`` (``archive/``), ``installation``, ``store`` (``storage/``)
5. a server: ``prepare``, ``devices``, ``model``, ``server`` (``serving/``), ``supervisor``,
   ``launch``, ``test_run``, ``client``
6. what a person sees: ``doctor``, ``report``, ``console``, ``timeline``, ``__main__``

What stands above knows what stands below, never the other way round: the layers are a contract in
the farm's ``pyproject.toml``.
"""
