"""The number of BLAS threads, which is the process's, where several of its threads limit it."""

from threadpoolctl import threadpool_info, threadpool_limits

from clip_adapter.adapters.engine.process import one_blas_thread


def threads() -> set[int]:
    return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}


def test_times_that_overlap_leave_the_number_as_it_was():
    with threadpool_limits(2, user_api="blas"):
        first, second = one_blas_thread(), one_blas_thread()
        first.__enter__()
        second.__enter__()
        assert threads() == {1}
        first.__exit__(None, None, None)
        assert threads() == {1}, "the other one is still in there"
        second.__exit__(None, None, None)
        assert threads() == {2}
        with one_blas_thread():
            assert threads() == {1}
        assert threads() == {2}
