// A team of threads that do the parts of one step together.
//
// Not OpenMP's own loops and barriers: a step has hundreds, and how libgomp waits at each depends on how many threads
// the whole process has. Here threads spin, and give their core away when they have waited long.
#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__) || defined(__i386__)
inline void rest() { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
inline void rest() { asm volatile("yield"); }
#else
inline void rest() {}
#endif

// One of the threads. All of them call the same functions in the same order.
class Team {
  public:
    struct Shared {
        // Of up to two loops that do not wait for one another: what is to be done next.
        alignas(64) std::atomic<int64_t> next[2] = {};
        alignas(64) std::atomic<int32_t> arrived = 0;
        alignas(64) std::atomic<uint32_t> phase = 0;
    };

    Team(Shared& shared, int me, int count) : me(me), count(count), shared(shared) {}

    // work(i) for every i below `total`, by whoever is free; done when all are.
    template <typename Work>
    void each(int64_t total, int64_t grain, Work work) {
        take(0, total, grain, work);
        wait();
    }

    // The same for two kinds of work.
    template <typename Work, typename Other>
    void both(int64_t total, Work work, int64_t others, Other other) {
        take(0, total, 1, work);
        take(1, others, 1, other);
        wait();
    }

    // Rows that cost little each.
    template <typename Work>
    void rows(int64_t total, Work work) {
        each(total, std::max<int64_t>(1, total / (4 * count)), work);
    }

    // Until all threads of the team are here.
    void wait() {
        if (count == 1) return reset();
        const uint32_t now = shared.phase.load(std::memory_order_relaxed);
        if (shared.arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            reset();
            shared.arrived.store(0, std::memory_order_relaxed);
            shared.phase.store(now + 1, std::memory_order_release);
            return;
        }
        for (int turns = 0; shared.phase.load(std::memory_order_acquire) == now; turns++) {
            if (turns < PATIENCE) rest();
            else sched_yield();  // who is waited for may be without a core
        }
    }

    const int me, count;

  private:
    static constexpr int PATIENCE = 2000;

    template <typename Work>
    void take(int which, int64_t total, int64_t grain, Work work) {
        std::atomic<int64_t>& next = shared.next[which];
        for (int64_t from; (from = next.fetch_add(grain, std::memory_order_relaxed)) < total;)
            for (int64_t i = from, end = std::min(total, from + grain); i < end; i++) work(i);
    }

    void reset() {
        for (auto& next : shared.next) next.store(0, std::memory_order_relaxed);
    }

    Shared& shared;
};

// work(team) in every thread of a team of at most so many.
template <typename Work>
void with_team(int threads, Work work) {
    Team::Shared shared;
#pragma omp parallel num_threads(threads)
    {
        Team team(shared, omp_get_thread_num(), omp_get_num_threads());
        work(team);
    }
}
