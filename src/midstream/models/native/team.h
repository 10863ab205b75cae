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
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
inline void rest() { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
inline void rest() { asm volatile("yield"); }
#else
inline void rest() {}
#endif

// Neighbours `first` to `end` of what a loop goes over.
struct Range {
    int64_t first, end;

    bool empty() const { return first >= end; }
};

// What is left of one thread's share of a loop: it takes from the front, who has nothing left takes from the back. So a
// thread goes through memory in one direction, and what the processor guesses it will read next is its own.
class Share {
  public:
    // What to do next of the `size` pieces in the loop of this `phase`, for their owner or another thread. The owner
    // takes half of what is left: each taking keeps the processor from reading ahead for a while.
    Range take(uint32_t phase, int64_t size, bool owner) {
        uint64_t now = taken.load(std::memory_order_relaxed);
        for (;;) {
            // What an earlier loop left says nothing of this one: nobody has to clear it.
            const uint64_t mine = now >> 2 * BITS == uint16_t(phase) ? now : uint64_t(uint16_t(phase)) << 2 * BITS;
            const int64_t front = mine & MOST, back = mine >> BITS & MOST, left = size - front - back;
            if (left <= 0) return {};
            const int64_t count = owner ? (left + 1) / 2 : 1;
            if (taken.compare_exchange_weak(now, mine + (owner ? count : count << BITS), std::memory_order_relaxed))
                return owner ? Range{front, front + count} : Range{size - back - 1, size - back};
        }
    }

  private:
    static constexpr int BITS = 24;
    static constexpr uint64_t MOST = (uint64_t(1) << BITS) - 1;

    // From the lowest bits: pieces taken from the front, from the back, and the loop's phase, of which sixteen bits are
    // enough: a step has some hundreds of loops.
    alignas(64) std::atomic<uint64_t> taken = 0;
};

// One of the threads. All of them call the same functions in the same order.
class Team {
  public:
    struct Shared {
        explicit Shared(int count) : shares(2 * count) {}

        alignas(64) std::atomic<int32_t> arrived = 0;
        alignas(64) std::atomic<uint32_t> phase = 0;  // counts the waits
        std::vector<Share> shares;                    // by thread, of up to two loops that do not wait for one another
    };

    Team(Shared& shared, int me, int count) : me(me), count(count), shared(shared) {}

    // work(i) for every i below `total`, by whoever is free, neighbours by the same thread; done when all are.
    template <typename Work>
    void each(int64_t total, Work work) {
        take(0, total, work);
        wait();
    }

    // The same for two kinds of work.
    template <typename Work, typename Other>
    void both(int64_t total, Work work, int64_t others, Other other) {
        take(0, total, work);
        take(1, others, other);
        wait();
    }

    // Rows that cost little each.
    template <typename Work>
    void rows(int64_t total, Work work) {
        const int64_t grain = std::max<int64_t>(1, total / (4 * count));
        each((total + grain - 1) / grain, [&](int64_t piece) {
            for (int64_t i = piece * grain, end = std::min(total, i + grain); i < end; i++) work(i);
        });
    }

    // Until all threads of the team are here.
    void wait() {
        const uint32_t now = shared.phase.load(std::memory_order_relaxed);
        if (shared.arrived.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
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

    // This thread's share first, then what others have not begun.
    template <typename Work>
    void take(int which, int64_t total, Work work) {
        const uint32_t phase = shared.phase.load(std::memory_order_relaxed);
        for (int of = 0; of < count; of++) {
            const int whose = (me + of) % count;
            const int64_t first = total * whose / count, size = total * (whose + 1) / count - first;
            Share& share = shared.shares[2 * whose + which];
            for (Range range; !(range = share.take(phase, size, of == 0)).empty();)
                for (int64_t i = range.first; i < range.end; i++) work(first + i);
        }
    }

    Shared& shared;
};

// work(team) in every thread of a team of at most so many.
template <typename Work>
void with_team(int threads, Work work) {
    Team::Shared shared(threads);
#pragma omp parallel num_threads(threads)
    {
        Team team(shared, omp_get_thread_num(), omp_get_num_threads());
        work(team);
    }
}
