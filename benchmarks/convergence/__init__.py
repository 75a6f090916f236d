# SPDX-License-Identifier: Apache-2.0
"""Do the methods reach the same loss? One small language model, trained by each of them on the same text.

Run it with ``python -m benchmarks.convergence``. What is compared, and how:

- **model** (:mod:`.model`): a byte-level LLaMA, vocabulary 256, fp32, random weights from the seed;
- **text** (:mod:`.data`): the sources of Python's standard library, or a text of your own;
- **run** (:mod:`.runner`): every variant sees the same weights, batches and schedule at a seed. Embedding, head and
  norms are always AdamW at one learning rate; only the matrices inside the layers are trained by the variant;
- **budget** (:mod:`.sweep`): each variant's learning rate is tuned over the same grid, at the first seed. That seed is
  reported by itself, the mean is over the others;
- **table** (:mod:`.table`): mean, standard deviation, and the difference to ``plain`` seed by seed, with its error.
"""
