#include "features.h"

#include "vec.h"

namespace fastdistill {
namespace {

template <class A>
FASTDISTILL_INLINE A root(A v) {
    return sizeof(A) == 8 ? A(__builtin_sqrt(v)) : A(__builtin_sqrtf(float(v)));
}

// A sum over a row that lanes and slots keep apart until its end.
template <class A>
struct RowSum {
    Vec<A> of_slot[2] = {};
    FASTDISTILL_INLINE A total() const { return sum_lanes<A>(of_slot[0] + of_slot[1]); }
};

template <class T>
FASTDISTILL_INLINE Accumulator<T> row_mean(const T* x, int64_t size) {
    using A = Accumulator<T>;
    RowSum<A> sum;
    sweep<A, 2>(size, [&](int64_t i, auto extent, int slot) { sum.of_slot[slot] += load(x + i, extent); });
    return sum.total() / A(size);
}

// The squared distance of two rows after each is brought to norm one, 2 - 2 cos. Derived from the differences
// of the rows, as 2 - 2 cos would cancel where they are alike, which is where training ends.
template <class T>
struct UnitDistance {
    using A = Accumulator<T>;
    A square, of_student, of_teacher;  // squared difference of the rows as they are; their norms
    A inverse, longer, squared;  // 1 / norm of student; by how much of its norm it is longer than teacher

    FASTDISTILL_INLINE UnitDistance(const T* s, const T* t, int64_t size) {
        RowSum<A> differences, products, students, teachers;
        sweep<A, 2>(size, [&](int64_t i, auto extent, int slot) {
            const Vec<A> a = load(s + i, extent), b = load(t + i, extent), d = a - b;
            differences.of_slot[slot] += d * d;
            products.of_slot[slot] += d * (a + b);
            students.of_slot[slot] += a * a;
            teachers.of_slot[slot] += b * b;
        });
        const A student_square = students.total(), teacher_square = teachers.total();
        square = differences.total();
        of_student = root(student_square);
        of_teacher = root(teacher_square);
        const A a = of_student > A(MIN_NORM) ? of_student : A(MIN_NORM);
        const A b = of_teacher > A(MIN_NORM) ? of_teacher : A(MIN_NORM);
        // With a and b the norms, a - b = (|s|^2 - |t|^2) / (a + b), and the term below is its negative.
        const bool normal = a == of_student && b == of_teacher;
        const A apart = normal ? products.total() / (a + b) : a - b;
        const A against = normal ? -apart : teacher_square / b - student_square / a;
        const A distance = (square + apart * against) / (a * b);
        inverse = A(1) / a;
        longer = apart / b;
        squared = distance > A(0) ? distance : A(0);
    }
};

// v where it is nearer to the mean than the limit, and zero elsewhere.
template <class A>
struct Mask {
    A mean, limit;
    FASTDISTILL_INLINE Vec<A> operator()(Vec<A> v, Vec<A> kept) const {
        const Vec<A> d = v - mean;
        const Vec<A> below = d < A(limit) ? kept : Vec<A>{};
        return d > -A(limit) ? below : Vec<A>{};
    }
};

template <class T>
void moments(const FeatureReduce& a, int64_t first_task, int64_t last_task) {
    using A = Accumulator<T>;
    for (int64_t task = first_task; task < last_task; ++task) {
        const int64_t b = task / a.chunks, chunk = task % a.chunks, D = a.in.channels;
        const int64_t first = chunk * a.in.tokens / a.chunks, end = (chunk + 1) * a.in.tokens / a.chunks;
        double* partial = a.partials + task * KD_PARTIALS;
        const Operand* const operands[] = {&a.in.student, &a.in.teacher};
        for (const Operand* operand : operands) {
            // The mean of the first row is near that of the chunk, so the squares of what is left do not
            // cancel.
            const A pivot = first < end ? row_mean(operand->row<T>(b, first), D) : A(0);
            double sum = 0, square = 0;
            for (int64_t s = first; s < end; ++s) {
                const T* x = operand->row<T>(b, s);
                RowSum<A> of_row, of_squares;
                sweep<A, 2>(D, [&](int64_t i, auto extent, int slot) {
                    const Vec<A> d = keep_inside<A>(load(x + i, extent) - pivot, extent);
                    of_row.of_slot[slot] += d;
                    of_squares.of_slot[slot] += d * d;
                });
                sum += of_row.total();
                square += of_squares.total();
            }
            partial[0] = pivot;
            partial[1] = sum;
            partial[2] = square;
            partial += 3;
        }
    }
}

template <class T, FeatureKd KIND>
void reduce(const FeatureReduce& a, int64_t first_task, int64_t last_task) {
    using A = Accumulator<T>;
    const int64_t D = a.in.channels, rows = a.in.batch * a.in.tokens;
    A* stats = static_cast<A*>(a.stats);
    for (int64_t task = first_task; task < last_task; ++task) {
        const int64_t b = task / a.chunks, chunk = task % a.chunks;
        double loss = 0, teacher_square = 0;
        for (int64_t s = chunk * a.in.tokens / a.chunks; s < (chunk + 1) * a.in.tokens / a.chunks; ++s) {
            const T *student = a.in.student.row<T>(b, s), *teacher = a.in.teacher.row<T>(b, s);
            if constexpr (KIND == FeatureKd::cosine) {
                const UnitDistance<T> distance(student, teacher, D);
                const int64_t row = b * a.in.tokens + s;
                stats[row] = distance.inverse;
                stats[rows + row] = distance.longer;
                stats[2 * rows + row] = distance.squared;
                loss += distance.squared;
                continue;
            }
            Mask<A> of_student{}, of_teacher{};
            if constexpr (KIND == FeatureKd::masked_mse) {
                of_student = {stats[b], stats[a.in.batch + b]};
                of_teacher = {stats[2 * a.in.batch + b], stats[3 * a.in.batch + b]};
            }
            RowSum<A> squares, teachers;
            sweep<A, 2>(D, [&](int64_t i, auto extent, int slot) {
                Vec<A> f = load(student + i, extent), g = load(teacher + i, extent);
                if constexpr (KIND == FeatureKd::masked_mse) {
                    f = of_student(f, f);
                    g = of_teacher(g, g);
                }
                const Vec<A> d = f - g;
                squares.of_slot[slot] += d * d;
                if constexpr (KIND == FeatureKd::relative_mse) teachers.of_slot[slot] += g * g;
            });
            loss += squares.total();
            if constexpr (KIND == FeatureKd::relative_mse) teacher_square += teachers.total();
        }
        a.partials[task * KD_PARTIALS] = loss;
        a.partials[task * KD_PARTIALS + 1] = teacher_square;
    }
}

template <class T, FeatureKd KIND, bool STREAM>
void backward_rows(const FeatureBackward& a, int64_t first_row, int64_t last_row) {
    using A = Accumulator<T>;
    const int64_t D = a.in.channels, rows = a.in.batch * a.in.tokens;
    const A* stats = static_cast<const A*>(a.stats);
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t b = row / a.in.tokens, s = row % a.in.tokens;
        const T *student = a.in.student.row<T>(b, s), *teacher = a.in.teacher.row<T>(b, s);
        T* out = static_cast<T*>(a.dstudent) + row * D;
        const A factor = A(a.factor);
        if constexpr (KIND == FeatureKd::cosine) {
            // s / |s| - t / |t| = (s - t - t * longer) / |s|, less its part along s.
            const A inverse = stats[row], longer = stats[rows + row], half = stats[2 * rows + row] / 2;
            sweep<A, 2>(D, [&](int64_t i, auto extent, int) {
                const Vec<A> f = load(student + i, extent), g = load(teacher + i, extent);
                write<STREAM>(out + i, (f - g - g * longer - f * half) * (factor * inverse * inverse),
                              extent);
            });
        } else if constexpr (KIND == FeatureKd::masked_mse) {
            const Mask<A> of_student{stats[b], stats[a.in.batch + b]};
            const Mask<A> of_teacher{stats[2 * a.in.batch + b], stats[3 * a.in.batch + b]};
            sweep<A, 2>(D, [&](int64_t i, auto extent, int) {
                const Vec<A> f = load(student + i, extent), g = load(teacher + i, extent);
                write<STREAM>(out + i, of_student(f, (f - of_teacher(g, g)) * factor), extent);
            });
        } else {
            sweep<A, 2>(D, [&](int64_t i, auto extent, int) {
                write<STREAM>(out + i, (load(student + i, extent) - load(teacher + i, extent)) * factor,
                              extent);
            });
        }
    }
    if constexpr (STREAM) stream_fence();
}

template <class T, FeatureKd KIND>
void backward(const FeatureBackward& a, int64_t first_row, int64_t last_row) {
    return a.stream ? backward_rows<T, KIND, true>(a, first_row, last_row)
                    : backward_rows<T, KIND, false>(a, first_row, last_row);
}

template <class T>
void statistics(const BlockStatistics& a, int64_t first_row, int64_t last_row) {
    using A = Accumulator<T>;
    const int64_t rows = a.in.batch * a.in.tokens;
    A* out = static_cast<A*>(a.out);
    for (int64_t row = first_row; row < last_row; ++row) {
        const int64_t b = row / a.in.tokens, s = row % a.in.tokens;
        const UnitDistance<T> distance(a.in.student.row<T>(b, s), a.in.teacher.row<T>(b, s), a.in.channels);
        out[row] = A(1) - distance.squared / 2;
        out[rows + row] = distance.square / A(a.in.channels);
        out[2 * rows + row] = distance.of_student;
        out[3 * rows + row] = distance.of_teacher;
    }
}

template <class T, FeatureKd KIND>
FeatureKernels kernels() {
    return {moments<T>, reduce<T, KIND>, backward<T, KIND>, statistics<T>};
}

template <class T>
FeatureKernels kernels(FeatureKd kind) {
    switch (kind) {
        case FeatureKd::mse:
            return kernels<T, FeatureKd::mse>();
        case FeatureKd::relative_mse:
            return kernels<T, FeatureKd::relative_mse>();
        case FeatureKd::cosine:
            return kernels<T, FeatureKd::cosine>();
        case FeatureKd::masked_mse:
            return kernels<T, FeatureKd::masked_mse>();
    }
    return {};
}

}  // namespace

namespace FASTDISTILL_CAPABILITY {

FeatureKernels feature_kernels(Scalar x, FeatureKd kind) {
    switch (x) {
        case Scalar::float32:
            return kernels<float>(kind);
        case Scalar::float64:
            return kernels<double>(kind);
        case Scalar::bfloat16:
            return kernels<bfloat16>(kind);
        case Scalar::float16:
            return kernels<float16>(kind);
    }
    return {};
}

}  // namespace FASTDISTILL_CAPABILITY
}  // namespace fastdistill
