"""Sets on many hosts, through a Dask cluster: the only package that imports ``distributed``.

Dask provides the connections, notices hosts that join and leave, limits each host to one build by a
resource. ``dispatch`` is a run, and decides which set goes where; ``scheduler`` is the connection,
``host`` contains the functions that run on a host.
"""
