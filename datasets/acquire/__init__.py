"""Getting datasets: sources, download, archives, arrangement, and the doctor that examines what is there.

Nothing that trains or evaluates imports this package.
"""
