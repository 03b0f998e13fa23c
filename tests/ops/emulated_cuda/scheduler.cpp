// Runs grids. Threads are fibers; one runs until it reaches a barrier, where
// the next one takes over. A barrier opens when every thread that has not
// returned stands before it, and a grid in which no thread can go on ends the
// process: that is a barrier which only some threads reach. Every other launch
// runs its blocks and threads backwards, so that a result that depends on their
// order differs from run to run.
#include "cuda_runtime.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {
namespace {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 64 << 10;

enum class State { ready, at_warp, at_block, returned };

struct Fiber {
    ucontext_t context;
    jmp_buf rest;  // where it gave way
    bool started;
    std::unique_ptr<char[]> stack{new char[STACK]};
    State state;
    unsigned turn;                 // exchanges so far
    char left[2][sizeof(double)];  // for the other lanes; two, as a lane may be one exchange ahead
};

std::vector<Fiber> fibers;
std::vector<float4> shared;
const std::function<void()>* body;
jmp_buf scheduler;
unsigned running;
bool backwards;

// Jumps, not swapcontext, which asks the kernel about signals each time.
void give_way(State state) {
    fibers[running].state = state;
    if (_setjmp(fibers[running].rest) == 0) _longjmp(scheduler, 1);
}

void resume(Fiber& fiber) {
    if (_setjmp(scheduler) != 0) return;
    if (fiber.started) _longjmp(fiber.rest, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

void start() {
    (*body)();
    give_way(State::returned);
}

// Opens a barrier if all threads in [first, last) that have not returned stand
// before it.
bool open(unsigned first, unsigned last, State barrier) {
    bool waiting = false;
    for (unsigned t = first; t < last; ++t) {
        if (fibers[t].state == State::returned) continue;
        if (fibers[t].state != barrier) return false;
        waiting = true;
    }
    for (unsigned t = first; t < last; ++t)
        if (fibers[t].state == barrier) fibers[t].state = State::ready;
    return waiting;
}

void run_block(unsigned threads) {
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[t];
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = STACK;
        fiber.state = State::ready;
        fiber.started = false;
        fiber.turn = 0;
        makecontext(&fiber.context, start, 0);
    }
    // NaN in every float: what is read before it is written shows.
    std::memset(static_cast<void*>(shared.data()), 0xff, shared.size() * sizeof(float4));
    for (bool going = true; going;) {
        for (unsigned i = 0; i < threads; ++i) {
            running = backwards ? threads - 1 - i : i;
            if (fibers[running].state != State::ready) continue;
            threadIdx = dim3(running);
            resume(fibers[running]);
        }
        going = open(0, threads, State::at_block);
        for (unsigned first = 0; first < threads; first += WARP)
            going |= open(first, std::min(first + WARP, threads), State::at_warp);
    }
    for (unsigned t = 0; t < threads; ++t)
        if (fibers[t].state != State::returned) {
            std::fprintf(stderr, "a barrier that only some threads reach: thread %u waits\n", t);
            std::abort();
        }
}

}  // namespace

void* dynamic_shared() {
    return shared.data();
}

void sync_block() {
    give_way(State::at_block);
}

void exchange(void* value, size_t bytes, unsigned lane) {
    const unsigned self = running, other = running / WARP * WARP + lane, turn = fibers[self].turn++ % 2;
    std::memcpy(fibers[self].left[turn], value, bytes);
    give_way(State::at_warp);
    if (fibers[other].turn < fibers[self].turn) {
        std::fprintf(stderr,
                     "thread %u takes a value that a thread which has returned did "
                     "not leave\n",
                     self);
        std::abort();
    }
    std::memcpy(value, fibers[other].left[turn], bytes);
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& thread) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    if (grid.x * size_t(grid.y) * grid.z == 0) {
        std::fprintf(stderr, "a launch without blocks, which CUDA refuses\n");
        std::abort();
    }
    if (fibers.size() < block.x) fibers = std::vector<Fiber>(block.x);
    shared.resize(shared_bytes / sizeof(float4) + 1);
    body = &thread;
    backwards = !backwards;
    gridDim = grid;
    blockDim = block;
    const size_t blocks = size_t(grid.x) * grid.y * grid.z;
    for (size_t i = 0; i < blocks; ++i) {
        const size_t index = backwards ? blocks - 1 - i : i;
        blockIdx = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
        run_block(block.x);
    }
}

}  // namespace emulation

extern "C" int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
    *stream = nullptr;
    return 0;
}
