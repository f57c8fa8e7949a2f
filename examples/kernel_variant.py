# %% [markdown]
# # Writing a kernel variant
# In IPython and Jupyter this is `%load_ext s2o_cupy` and a cell that starts with `%%s2o_cuda pool --check --bench`;
# here the same is called from Python. With a GPU the variant runs there; without one it is compiled if cuda-core is
# installed, and checked in an emulation on the CPU if g++ is. docs/iterate.md has a worked example from an H100.

# %%
import s2o_cupy as s2o
from s2o_cupy.iterate.report import History
from s2o_cupy.iterate.session import Session
from s2o_cupy.sources import kernel_folder

shell = Session()
pool = (kernel_folder() / "pool.cu").read_text()

# %% A slip: the mean of a block, over one key too many. The worst element is shown.
verdict = shell.try_cuda("pool", pool.replace("total / (sum_t)count", "total / (sum_t)(count + 1)"), check=True)
print(verdict)

# %% A patch of one function is enough; what does not compile is told by the cell's own line.
patch = """
__device__ int scan_block(int x) {
    return sum_before(x);
}
"""
print(shell.try_cuda("remap", patch, check=True))

# %% The block's sums added in another order: right.
other_order = pool.replace("for (int s = 0; s < strands; ++s)", "for (int s = strands - 1; s >= 0; --s)")
verdict = shell.try_cuda("pool", other_order, check=True, bench=True)
print(verdict)

# %% The variant inside the real attention, on a GPU; elsewhere `attention` uses the CPU backend, and would warn.
with s2o.use_kernel("pool", verdict.variant) as variant:
    print("in use:", variant.name, variant.file)

# %% Everything that was tried.
print(History(shell.history))
shell.close()
