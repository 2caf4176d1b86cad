"""Sets on many hosts, through a Dask cluster: the only package that imports ``distributed``.

Dask brings the connections, the hosts' coming and going, the resource that keeps it at one build
a host, and the dashboard. ``spread`` is a run, ``dispatch`` decides which set goes where,
``scheduler`` is the connection, ``host`` is what runs on a host.
"""
