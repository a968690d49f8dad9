"""A start of scientific Python: import numpy and scipy, draw a plot without a display, end."""

import io
import os

# matplotlib keeps its list of fonts there; the image brings it.
os.environ.setdefault("MPLCONFIGDIR", "/var/cache/matplotlib")

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as pyplot
import numpy
import scipy.stats

x = numpy.linspace(-4, 4, 400)
figure, axes = pyplot.subplots()
axes.plot(x, scipy.stats.norm.pdf(x), label="normal")
axes.plot(x, scipy.stats.t.pdf(x, df=3), label="Student's t")
axes.legend()
picture = io.BytesIO()
figure.savefig(picture, format="png")
print(f"a plot of {len(picture.getvalue())} bytes")
