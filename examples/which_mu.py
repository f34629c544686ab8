"""Which µ? A whole path at once, the error of every answer certified, and the choice by validation.

    ŷ_m = (1 − µ_m)(I − µ_m P)⁻¹ s  for all µ_m from one Krylov space (gd.solve_path)

A smooth function on points in the plane is measured with noise at some of them. Diffusing the measurements
and, as a second signal, where they were taken, gives the weighted mean of measurements near every point; µ
sets how near. Part of them are kept back to choose µ by; the last column needs the truth, which nobody has.

    python examples/which_mu.py
    python examples/which_mu.py --noise 1.0 --out which_mu.png

Prints for every µ the bound of the error of the solve, the validation error and the true error; and products
of the path beside those of one solve for each µ. Needs graphdiff and scipy. Takes seconds.
"""

import argparse

import torch

import graphdiff as gd


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=2000, help="points in the unit square")
    parser.add_argument("--measured", type=int, default=500, help="how many are measured; a third validates")
    parser.add_argument("--noise", type=float, default=0.5, help="standard deviation of a measurement")
    parser.add_argument("--values", type=int, default=20, help="how many µ, from 0.5 to 0.9999")
    parser.add_argument("--tol", type=float, default=1e-8, help="of every solve")
    parser.add_argument("--out", metavar="PNG", help="plot both errors into this file")
    options = parser.parse_args(arguments)

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(options.points, 2, generator=generator, dtype=torch.float64)
    truth = torch.sin(6 * x[:, 0]) * torch.cos(5 * x[:, 1])
    noisy = truth + options.noise * torch.randn(options.points, generator=generator, dtype=torch.float64)
    order = torch.randperm(options.points, generator=generator)
    kept_back, known = order[: options.measured // 3], order[options.measured // 3 : options.measured]

    P = gd.SparseTransition.from_points(x, k=10, bandwidth=0.03)
    s = torch.zeros(options.points, 2, dtype=torch.float64)
    s[known, 0], s[known, 1] = noisy[known], 1.0
    mus = (1 - torch.logspace(-0.30103, -4, options.values, dtype=torch.float64)).tolist()
    path = gd.solve_path(P, s, mus, tol=options.tol)
    one_by_one = sum(
        int(gd.solve(P, s, mu, solver=gd.solvers.CG(), tol=options.tol).matvecs.max()) for mu in mus
    )

    # A point that no measurement reaches to within the tolerance says nothing: the mean stands there.
    mass = path.value[..., 1]
    reached = path.lower[..., 1] > 100 * path.error_bound[..., 1:]
    mean = torch.where(reached, path.value[..., 0] / mass, noisy[known].mean())
    validation = (mean - noisy)[:, kept_back].square().mean(1).sqrt()
    true = (mean - truth).square().mean(1).sqrt()
    best = int(validation.argmin())
    print("       µ      steps   error bound   validation   true error")
    for m, mu in enumerate(mus):
        mark = "  ← chosen" if m == best else ""
        print(
            f"{mu:8.5f} {int(path.steps[m].max()):10d}   {float(path.error_bound[m].max()):11.1e}   "
            f"{float(validation[m]):10.4f}   {float(true[m]):10.4f}{mark}"
        )
    print(
        f"products: {int(path.matvecs.sum(0).max())} for the path, {one_by_one} for one solve after another"
    )
    print(f"validation cannot fall below the noise of what was kept back, {options.noise}")
    if options.out:
        draw(mus, validation.numpy(), true.numpy(), best, options.out)


def draw(mus, validation, true, best, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.2), dpi=110, layout="constrained")
    axis = figure.subplots()
    distance = [1 - mu for mu in mus]
    axis.semilogx(distance, validation, ".-", label="validation")
    axis.semilogx(distance, true, ".-", label="true error")
    axis.axvline(distance[best], color="k", linewidth=0.8, linestyle=":", label="chosen")
    axis.invert_xaxis()
    axis.set(xlabel="1 − µ", ylabel="root mean square error")
    axis.legend()
    figure.savefig(file)
    print(f"drawn: {file}")


if __name__ == "__main__":
    main()
